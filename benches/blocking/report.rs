//! Medians, ratios and tables.

use std::fmt::Write;

use crate::row::Contender;

/// What one contender reached in each round, in requests per second.
pub struct Result {
    pub contender: Contender,
    pub rates: Vec<f64>,
}

/// All there is to tell of one row.
pub struct Table {
    pub name: &'static str,
    pub results: Vec<Result>,
}

/// A ratio to be reached.
pub struct Target {
    pub row: &'static str,
    pub of: fn(Contender) -> bool,
    pub to: fn(Contender) -> bool,
    /// `None`: shown for comparison.
    pub least: Option<f64>,
}

pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

fn thousands(rate: f64) -> String {
    format!("{:.1}", rate / 1000.0)
}

/// Medians and all rounds.
pub fn rates(tables: &[Table]) -> String {
    let mut out = String::from(
        "| 4 KiB requests, thousands per second | by | median | ns each | all rounds |\n\
         |---|---|---:|---:|---|\n",
    );
    for table in tables {
        for result in &table.results {
            let middle = median(&result.rates);
            let rounds: Vec<_> = result.rates.iter().map(|rate| thousands(*rate)).collect();
            let _ = writeln!(
                out,
                "| {} | {} | {} | {:.0} | {} |",
                table.name,
                result.contender.name(),
                thousands(middle),
                1e9 / middle,
                rounds.join(" ")
            );
        }
    }
    out
}

/// Ratios by round, their medians, and whether that is what is wanted.
pub fn ratios(tables: &[Table], targets: &[Target]) -> String {
    let mut out = String::from(
        "| | ratio | median | from, to | target | |\n\
         |---|---|---:|---:|---:|---|\n",
    );
    for target in targets {
        let Some(table) = tables.iter().find(|table| table.name == target.row) else { continue };
        let find = |wanted: fn(Contender) -> bool| {
            table.results.iter().find(|result| wanted(result.contender))
        };
        let (Some(of), Some(to)) = (find(target.of), find(target.to)) else { continue };
        let by_round: Vec<_> = of.rates.iter().zip(&to.rates).map(|(a, b)| a / b).collect();
        let middle = median(&by_round);
        let least = by_round.iter().copied().fold(f64::INFINITY, f64::min);
        let most = by_round.iter().copied().fold(0.0, f64::max);
        let (wanted, verdict) = match target.least {
            None => (String::new(), ""),
            Some(wanted) if middle >= wanted => (format!("{wanted}"), "met"),
            Some(wanted) => (format!("{wanted}"), "missed"),
        };
        let _ = writeln!(
            out,
            "| {} | {} : {} | **{middle:.2}** | {least:.2}, {most:.2} | {wanted} | {verdict} |",
            target.row,
            of.contender.name(),
            to.contender.name(),
        );
    }
    out
}
