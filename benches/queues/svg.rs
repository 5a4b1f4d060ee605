//! Lines, bars and words as SVG. Knows nothing of what they mean.

use std::fmt::Write;

/// Where a text is anchored.
#[derive(Clone, Copy)]
pub enum Anchor {
    Start,
    Middle,
    End,
}

/// A picture under construction.
pub struct Svg {
    width: f64,
    height: f64,
    body: String,
}

/// Of words and axes.
pub const INK: &str = "#24292f";
/// Of lines that are only there to guide the eye.
pub const FAINT: &str = "#d0d7de";

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

impl Svg {
    pub fn new(width: f64, height: f64) -> Svg {
        Svg { width, height, body: String::new() }
    }

    pub fn line(&mut self, (x1, y1): (f64, f64), (x2, y2): (f64, f64), colour: &str, width: f64) {
        let _ = writeln!(
            self.body,
            "<line x1='{x1:.1}' y1='{y1:.1}' x2='{x2:.1}' y2='{y2:.1}' \
             stroke='{colour}' stroke-width='{width}'/>"
        );
    }

    /// Points joined by lines, with a dot at each. `dashes`: as SVG writes them.
    pub fn curve(&mut self, points: &[(f64, f64)], colour: &str, dashes: &str) {
        let list: Vec<_> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let _ = writeln!(
            self.body,
            "<polyline points='{}' fill='none' stroke='{colour}' stroke-width='2' \
             stroke-dasharray='{dashes}'/>",
            list.join(" ")
        );
        for (x, y) in points {
            let _ = writeln!(self.body, "<circle cx='{x:.1}' cy='{y:.1}' r='3' fill='{colour}'/>");
        }
    }

    pub fn bar(&mut self, (x, y): (f64, f64), width: f64, height: f64, colour: &str) {
        let _ = writeln!(
            self.body,
            "<rect x='{x:.1}' y='{y:.1}' width='{width:.1}' height='{height:.1}' fill='{colour}'/>"
        );
    }

    pub fn text(&mut self, (x, y): (f64, f64), anchor: Anchor, size: f64, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let _ = writeln!(
            self.body,
            "<text x='{x:.1}' y='{y:.1}' text-anchor='{anchor}' font-size='{size}'>{}</text>",
            escaped(text)
        );
    }

    /// The whole file. It has a background of its own: nobody knows on what it is shown.
    pub fn finish(self) -> String {
        let Svg { width, height, body } = self;
        format!(
            "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' \
             width='{width}' height='{height}' font-family='sans-serif' fill='{INK}'>\n\
             <rect width='{width}' height='{height}' fill='#ffffff'/>\n{body}</svg>\n"
        )
    }
}
