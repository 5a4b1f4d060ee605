//! What was measured, judged and told: tables, and the same as JSON.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::chains::Chain;
use crate::common::machine;
use crate::common::numbers::{by_round, median, range};
use crate::common::qemu;
use crate::row::{Target, Who};
use crate::run::{Measured, Side};

/// A ratio, and whether it is what is wanted.
pub struct Verdict {
    pub row: String,
    pub of: String,
    pub to: String,
    pub median: f64,
    pub range: (f64, f64),
    pub least: Option<f64>,
    /// Empty where nothing is wanted.
    pub text: &'static str,
}

const MET: &str = "met";
const MISSED: &str = "missed";
const NO_ROOM: &str = "met: the raw file itself leaves less room";

/// Where our part of what a raw file reaches would be less than what is wanted, reaching
/// that part is enough: nobody is asked to be faster than the disk.
fn no_room(measured: &Measured, target: &Target, least: f64) -> bool {
    let ratio = |of: usize, to: usize| {
        median(&by_round(&measured.sides[of].rates, &measured.sides[to].rates))
    };
    let enough = target.room.map(|room| ratio(room.of, room.to) * room.part);
    enough.is_some_and(|enough| enough < least && ratio(target.of, target.to) >= enough)
}

/// Judges all ratios of a row.
pub fn judge(measured: &Measured) -> Vec<Verdict> {
    let judge = |target: &Target| {
        let (of, to) = (&measured.sides[target.of], &measured.sides[target.to]);
        let ratios = by_round(&of.rates, &to.rates);
        let median = median(&ratios);
        let text = match target.least {
            None => "",
            Some(least) if median >= least => MET,
            Some(least) if no_room(measured, target, least) => NO_ROOM,
            Some(_) => MISSED,
        };
        let row = measured.row.name.clone();
        let (of, to, least) = (of.name.clone(), to.name.clone(), target.least);
        Verdict { row, of, to, median, range: range(&ratios), least, text }
    };
    measured.row.targets.iter().map(judge).collect()
}

/// Syncs for each request, and whether there are too many.
fn syncs(measured: &Measured) -> Option<(f64, f64, &'static str)> {
    let most = measured.row.most_syncs?;
    let side = &measured.sides[0];
    let syncs = side.last.syncs as f64 / side.count as f64;
    Some((syncs, most, if syncs <= most { MET } else { MISSED }))
}

/// Ratios and what they are to be.
pub fn ratios(all: &[Measured]) -> String {
    let mut out = String::from(
        "| 4 KiB requests | ratio | median | from, to | target | |\n\
         |---|---|---:|---:|---:|---|\n",
    );
    for measured in all {
        for verdict in judge(measured) {
            let Verdict { row, of, to, median, range: (low, high), least, text } = verdict;
            let least = least.map(|least| least.to_string()).unwrap_or_default();
            let _ = writeln!(
                out,
                "| {row} | {of} : {to} | **{median:.2}** | {low:.2}, {high:.2} | {least} | {text} |"
            );
        }
        if let Some((syncs, most, text)) = syncs(measured) {
            let name = &measured.row.name;
            let _ = writeln!(
                out,
                "| {name} | syncs for each write | **{syncs:.2}** | | at most {most} | {text} |"
            );
        }
    }
    out
}

/// Medians and all rounds.
pub fn rates(all: &[Measured]) -> String {
    let mut out = String::from(
        "| 4 KiB requests, thousands per second | by | median | all rounds | requests in each |\n\
         |---|---|---:|---|---:|\n",
    );
    for measured in all {
        for side in &measured.sides {
            let rounds: Vec<_> = side.rates.iter().map(|rate| thousands(*rate)).collect();
            let (row, middle) = (&measured.row.name, thousands(median(&side.rates)));
            let (name, rounds, count) = (&side.name, rounds.join(" "), side.count);
            let _ = writeln!(out, "| {row} | {name} | {middle} | {rounds} | {count} |");
        }
    }
    out
}

fn thousands(rate: f64) -> String {
    if rate < 10_000.0 { format!("{:.2}", rate / 1e3) } else { format!("{:.1}", rate / 1e3) }
}

/// What a link of a chain costs.
pub fn chains(chains: &[Chain]) -> String {
    let mut out = String::from(
        "| reads of the base through overlays, depth 1, page cache | by | ns each | \
         process, MiB | metadata, MiB |\n|---|---|---:|---:|---:|\n",
    );
    let mib = |bytes: u64| format!("{:.1}", bytes as f64 / f64::from(1 << 20));
    for chain in chains {
        let Chain { links, who, resident, metadata, .. } = chain;
        let (latency, resident) = (median(&chain.latencies), mib(*resident));
        let metadata = metadata.map(mib).unwrap_or_default();
        let _ = writeln!(out, "| {links} | {who} | {latency:.0} | {resident} | {metadata} |");
    }
    for ours in [true, false] {
        if let Some((who, time, bytes)) = per_link(chains, ours) {
            let kib = bytes / 1024.0;
            let _ = writeln!(out, "| each link more | {who} | {time:.0} | {kib:.0} KiB | |");
        }
    }
    out
}

/// The difference of the longest and the shortest chain, by link: time, bytes.
fn per_link(chains: &[Chain], ours: bool) -> Option<(&str, f64, f64)> {
    let mut of_one = chains.iter().filter(|chain| chain.metadata.is_some() == ours);
    let (short, long) = (of_one.next()?, of_one.next()?);
    let links = (long.links - short.links) as f64;
    let time = (median(&long.latencies) - median(&short.latencies)) / links;
    Some((&long.who, time, (long.resident as f64 - short.resident as f64) / links))
}

/// All figures.
pub fn json(all: &[Measured], chains: &[Chain], rounds: usize) -> Value {
    let side = |side: &Side| {
        let ours = side.job.who == Who::Ours;
        let each = |count: u64| ours.then(|| count as f64 / side.count as f64);
        json!({
            "name": side.name, "cluster_size": side.job.cluster, "extended_l2": side.job.extended,
            "direct": side.job.direct, "depth": side.job.depth, "queues": side.job.queues,
            "requests": side.count, "per_second": side.rates, "median": median(&side.rates),
            "heap_allocations_per_request": each(side.last.allocations),
            "syncs_per_request": each(side.last.syncs),
        })
    };
    let verdict = |verdict: Verdict| {
        json!({
            "of": verdict.of, "to": verdict.to, "median": verdict.median,
            "from": verdict.range.0, "up_to": verdict.range.1, "target": verdict.least,
            "verdict": verdict.text,
        })
    };
    let row = |measured: &Measured| {
        json!({
            "name": measured.row.name,
            "sides": measured.sides.iter().map(side).collect::<Vec<_>>(),
            "ratios": judge(measured).into_iter().map(verdict).collect::<Vec<_>>(),
            "syncs": syncs(measured).map(|(syncs, most, text)| {
                json!({ "per_request": syncs, "at_most": most, "verdict": text })
            }),
        })
    };
    let chain = |chain: &Chain| {
        json!({
            "links": chain.links, "by": chain.who, "ns": chain.latencies,
            "median": median(&chain.latencies), "resident_bytes": chain.resident,
            "metadata_bytes": chain.metadata,
        })
    };
    json!({
        "machine": machine::machine(), "date": machine::date(), "qemu": qemu::version(),
        "rounds": rounds,
        "rows": all.iter().map(row).collect::<Vec<_>>(),
        "chains": chains.iter().map(chain).collect::<Vec<_>>(),
    })
}
