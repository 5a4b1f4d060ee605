//! The charts of docs/performance.md: writes per second over the cluster size, and
//! all targets with what was reached.

use std::path::Path;

use crate::common::machine;
use crate::common::numbers::median;
use crate::common::qemu;
use crate::report::judge;
use crate::row::{Who, size};
use crate::run::Measured;
use crate::svg::{Anchor, FAINT, INK, Svg};

const OURS: &str = "#0969da";
const QEMU: &str = "#bc4c00";
const MET: &str = "#1a7f37";
const MISSED: &str = "#cf222e";

/// Writes those that there are figures for.
pub fn write(all: &[Measured], directory: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(directory)?;
    let under = format!("{}; {}; {}", machine::machine(), qemu::version(), machine::date());
    let sweep: Vec<_> = all.iter().filter(|m| m.sides.iter().any(|s| !s.job.extended)).collect();
    if !sweep.is_empty() {
        std::fs::write(directory.join("cluster-size.svg"), cluster_sizes(&sweep, &under))?;
    }
    std::fs::write(directory.join("targets.svg"), targets(all, &under))
}

/// A line for each contender; the scale is logarithmic.
fn cluster_sizes(sweep: &[&Measured], under: &str) -> String {
    let (left, top, right, bottom) = (70.0, 60.0, 560.0, 380.0);
    let mut svg = Svg::new(800.0, 450.0);
    let title = "Scattered 4 KiB writes per second, new overlay on a full base, O_DIRECT, depth 32";
    svg.text((20.0, 28.0), Anchor::Start, 15.0, title);
    let lines = [
        ("qcow2rs, extended L2 entries", Who::Ours, true, OURS, ""),
        ("QEMU, extended L2 entries", Who::Qemu, true, QEMU, ""),
        ("qcow2rs, traditional", Who::Ours, false, OURS, "6 4"),
        ("QEMU, traditional", Who::Qemu, false, QEMU, "6 4"),
    ];
    let rate = |measured: &Measured, who, extended| {
        let sides = &measured.sides;
        let side = sides.iter().find(|s| s.job.who == who && s.job.extended == extended);
        side.map(|side| median(&side.rates))
    };
    let all = sweep.iter().flat_map(|m| m.sides.iter().map(|side| median(&side.rates)));
    let (low, high) = all.fold((f64::MAX, 1.0_f64), |(l, h), rate| (l.min(rate), h.max(rate)));
    let (low, high) = (low.log10().floor(), high.log10().ceil());
    let y = |rate: f64| bottom - (rate.log10() - low) / (high - low) * (bottom - top);
    let x = |index: usize| left + 40.0 + index as f64 * (right - left - 80.0) / 5.0;
    for power in low as i32..=high as i32 {
        let rate = 10_f64.powi(power);
        svg.line((left, y(rate)), (right, y(rate)), FAINT, 1.0);
        svg.text((left - 8.0, y(rate) + 4.0), Anchor::End, 12.0, &format!("{rate}"));
    }
    svg.line((left, bottom), (right, bottom), INK, 1.0);
    for (index, measured) in sweep.iter().enumerate() {
        let cluster = size(measured.sides[0].job.cluster);
        svg.text((x(index), bottom + 20.0), Anchor::Middle, 12.0, &cluster);
    }
    svg.text(((left + right) / 2.0, bottom + 40.0), Anchor::Middle, 12.0, "cluster size");
    let mut ends = Vec::new();
    for (name, who, extended, colour, dashes) in lines {
        let points: Vec<_> = (sweep.iter().enumerate())
            .filter_map(|(index, measured)| Some((x(index), y(rate(measured, who, extended)?))))
            .collect();
        svg.curve(&points, colour, dashes);
        ends.extend(points.last().map(|(_, y)| (*y, name)));
    }
    // The names, beside the ends of their lines, none above another.
    ends.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut free = 0.0_f64;
    for (y, name) in ends {
        let at = y.max(free);
        svg.text((right + 8.0, at + 4.0), Anchor::Start, 12.0, name);
        free = at + 16.0;
    }
    svg.text((20.0, 440.0), Anchor::Start, 10.0, under);
    svg.finish()
}

/// A bar for each target, in parts of it: those that end right of the line are met.
fn targets(all: &[Measured], under: &str) -> String {
    let verdicts: Vec<_> = all.iter().flat_map(judge).filter(|v| v.least.is_some()).collect();
    let (left, top, step, unit, most) = (470.0, 60.0, 20.0, 120.0, 2.5);
    let height = top + verdicts.len() as f64 * step;
    let mut svg = Svg::new(1000.0, height + 50.0);
    svg.text((20.0, 28.0), Anchor::Start, 15.0, "What was reached, in parts of the target");
    for (index, verdict) in verdicts.iter().enumerate() {
        let y = top + index as f64 * step;
        let Some(least) = verdict.least else { continue };
        let to = verdict.to.split(',').next().unwrap_or_default();
        let against = if verdict.to.contains("extended off") { "extended off" } else { to };
        let name = format!("{}: {against}", verdict.row);
        svg.text((left - 8.0, y + 13.0), Anchor::End, 11.0, &name);
        let colour = if verdict.text == "missed" { MISSED } else { MET };
        let part = (verdict.median / least).min(most);
        svg.bar((left, y + 3.0), part * unit, step - 6.0, colour);
        let note = if verdict.text.starts_with("met:") { " (raw file: no more room)" } else { "" };
        let reached = format!("{:.2} of {least}{note}", verdict.median);
        svg.text((left + part.max(1.0) * unit + 6.0, y + 13.0), Anchor::Start, 11.0, &reached);
    }
    svg.line((left + unit, top - 6.0), (left + unit, height + 4.0), INK, 1.5);
    svg.text((left + unit, top - 10.0), Anchor::Middle, 11.0, "target");
    svg.text((20.0, height + 36.0), Anchor::Start, 10.0, under);
    svg.finish()
}
