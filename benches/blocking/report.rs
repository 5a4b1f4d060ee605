//! Medians, ratios and tables.

use std::fmt::Write;

use crate::common::numbers::{self, median, range};
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

/// Tells a contender from the others.
pub type Is = fn(Contender) -> bool;

/// A ratio to be reached.
pub struct Target {
    pub row: &'static str,
    pub of: Is,
    pub to: Is,
    /// `None`: shown for comparison.
    pub least: Option<f64>,
    /// Somebody of whom reaching this part is enough, if that is less: nobody is
    /// asked to be faster than the disk.
    pub enough: Option<(Is, f64)>,
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

/// The rates of one contender in those of another, round by round.
fn by_round(of: &Result, to: &Result) -> Vec<f64> {
    numbers::by_round(&of.rates, &to.rates)
}

/// Ratios by round, their medians, and whether that is what is wanted.
pub fn ratios(tables: &[Table], targets: &[Target]) -> String {
    let mut out = String::from(
        "| | ratio | median | from, to | target | |\n\
         |---|---|---:|---:|---:|---|\n",
    );
    for target in targets {
        let Some(table) = tables.iter().find(|table| table.name == target.row) else { continue };
        let find = |wanted: Is| table.results.iter().find(|result| wanted(result.contender));
        let (Some(of), Some(to)) = (find(target.of), find(target.to)) else { continue };
        let by_round = by_round(of, to);
        let middle = median(&by_round);
        let (least, most) = range(&by_round);
        let (wanted, verdict) = match target.least {
            None => (String::new(), ""),
            Some(wanted) if middle >= wanted => (format!("{wanted}"), "met"),
            Some(wanted) => {
                let enough = target.enough.and_then(|(who, part)| {
                    let raw = median(&self::by_round(find(who)?, to));
                    Some(raw * part).filter(|enough| middle >= *enough)
                });
                let verdict = if enough.is_some() { "no room for more" } else { "missed" };
                (format!("{wanted}"), verdict)
            }
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
