//! Plots as SVG: pure functions from series to text, for reports and benches.
//!
//! A [`Chart`] has a horizontal and a vertical axis, series made of [`Step`]s, and behind them bands and marks that
//! say what was the case at the time. A [`Strip`] has spans of time and no vertical axis. Both are [`Panel`]s, drawn
//! one below the other by [`document`] or, in a page, one by one by [`panel`]. Colours are classes that [`STYLE`]
//! gives a value to, one for light and one for dark surroundings; what is told apart by colour is also named in the
//! legend, in the order in which it is drawn.
//!
//! A step is a value that holds from one `x` to another: rates and gauges are known for stretches, and a slope
//! between two would be made up. Where there is no step there is nothing: gaps stay gaps.
//!
//! Trap. Names come from other hosts: every text goes through [`escape`], which also drops what XML does not allow
//! at all.

use std::fmt::Write;

/// Of a panel, in the SVG's own units; a page scales it.
pub const WIDTH: f64 = 960.0;
const CHART: f64 = 230.0;
const STRIP: f64 = 76.0;

const LEFT: f64 = 84.0;
const RIGHT: f64 = 18.0;
const TOP: f64 = 36.0;
const BOTTOM: f64 = 30.0;

/// Colours there are; more begin anew.
pub const COLOURS: usize = 8;

/// What gives the classes their looks. Once a page, or within a document.
pub const STYLE: &str = "\
:root{--ink:#1c2733;--soft:#5b6875;--grid:#dfe4e9;--paper:#ffffff;--band:#8a97a5;--stop:#c22f2f;\
--c0:#2f6fb2;--c1:#d07c1f;--c2:#a63a78;--c3:#3a8a58;--c4:#7a5cc0;--c5:#1f9aa5;--c6:#9a7b1c;--c7:#6b7683}
@media (prefers-color-scheme:dark){:root{--ink:#e4e9ee;--soft:#9fabb7;--grid:#2f3944;--paper:#151b21;--band:#7d8a97;\
--stop:#ff7b72;--c0:#6aa9e9;--c1:#eba455;--c2:#dd7db2;--c3:#6cc48d;--c4:#a992ea;--c5:#58c6d0;--c6:#cdb057;--c7:#9aa6b2}}
@media print{:root{--ink:#000000;--soft:#444444;--grid:#cccccc;--paper:#ffffff;--band:#888888;--stop:#c22f2f;\
--c0:#2f6fb2;--c1:#d07c1f;--c2:#a63a78;--c3:#3a8a58;--c4:#7a5cc0;--c5:#1f9aa5;--c6:#9a7b1c;--c7:#6b7683}}
.plot{font:12px system-ui,'Segoe UI','DejaVu Sans',sans-serif}
.plot text{fill:var(--soft)}.plot .title{fill:var(--ink);font-weight:600;font-size:13px}.plot .key{fill:var(--ink)}
.plot .grid{stroke:var(--grid);stroke-width:1;fill:none}.plot .paper{fill:var(--paper)}
.plot .band{fill:var(--band);opacity:.22}.plot .stop{fill:var(--stop);opacity:.28}
.plot .mark{stroke:var(--stop);stroke-width:1;stroke-dasharray:4 3;fill:none}.plot .marked{fill:var(--stop)}
.plot .area{opacity:.82;stroke:none}.plot .line{fill:none;stroke-width:1.6;stroke-linejoin:round}
.plot .word{fill:var(--paper);font-weight:600}
.f0{fill:var(--c0)}.f1{fill:var(--c1)}.f2{fill:var(--c2)}.f3{fill:var(--c3)}\
.f4{fill:var(--c4)}.f5{fill:var(--c5)}.f6{fill:var(--c6)}.f7{fill:var(--c7)}
.s0{stroke:var(--c0)}.s1{stroke:var(--c1)}.s2{stroke:var(--c2)}.s3{stroke:var(--c3)}\
.s4{stroke:var(--c4)}.s5{stroke:var(--c5)}.s6{stroke:var(--c6)}.s7{stroke:var(--c7)}
";

/// What numbers on an axis are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    Seconds,
    /// Drawn on a logarithmic scale.
    Millis,
    BitsPerSecond,
    Bytes,
    Count,
}

/// A value that holds from `from` to `to`, or what lies between two values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    pub from: f64,
    pub to: f64,
    pub low: f64,
    pub high: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// What lies between `low` and `high` is filled.
    Area,
    /// `high` is drawn.
    Line,
}

#[derive(Clone, Debug)]
pub struct Series {
    pub name: String,
    pub colour: usize,
    pub shape: Shape,
    /// In order.
    pub steps: Vec<Step>,
}

/// Something that was the case for a time, behind the series.
#[derive(Clone, Debug)]
pub struct Band {
    pub from: f64,
    pub to: f64,
    pub name: String,
    /// In the colour of what stands still, not that of what is missing.
    pub is_stop: bool,
}

/// A value worth comparing with, across the chart.
#[derive(Clone, Debug)]
pub struct Level {
    pub at: f64,
    pub name: String,
}

#[derive(Clone, Debug)]
pub struct Chart {
    pub title: String,
    /// Seconds at the left and at the right.
    pub from: f64,
    pub to: f64,
    pub unit: Unit,
    pub series: Vec<Series>,
    pub bands: Vec<Band>,
    pub levels: Vec<Level>,
}

/// Spans of time side by side.
#[derive(Clone, Debug)]
pub struct Strip {
    pub title: String,
    pub from: f64,
    pub to: f64,
    pub spans: Vec<(Step, usize, String)>,
    pub bands: Vec<Band>,
}

#[derive(Clone, Debug)]
pub enum Panel {
    Chart(Chart),
    Strip(Strip),
}

/// A text as it may stand in XML, in an attribute too.
pub fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            '\n' | '\t' => safe.push(c),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => safe.push('\u{fffd}'),
            c => safe.push(c),
        }
    }
    safe
}

/// A number as short as it can be said: at most two digits after the point.
fn short(value: f64) -> String {
    let text = format!("{value:.2}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_string(),
        false => text,
    }
}

/// A coordinate: a tenth of a unit is finer than anybody sees.
fn at(value: f64) -> String {
    let text = format!("{value:.1}");
    text.strip_suffix(".0").map(str::to_string).unwrap_or(text)
}

/// The word for a unit so large that `most` is a handy number of it, and its size.
fn scaled(unit: Unit, most: f64) -> (f64, &'static str) {
    let steps: &[(f64, &str)] = match unit {
        Unit::BitsPerSecond => &[
            (1e9, "Gbit/s"),
            (1e6, "Mbit/s"),
            (1e3, "kbit/s"),
            (1.0, "bit/s"),
        ],
        Unit::Bytes => &[
            (1_099_511_627_776.0, "TiB"),
            (1_073_741_824.0, "GiB"),
            (1_048_576.0, "MiB"),
            (1024.0, "KiB"),
            (1.0, "B"),
        ],
        Unit::Millis => &[(1000.0, "s"), (1.0, "ms"), (1e-3, "µs")],
        Unit::Count => &[(1e6, "M"), (1e3, "k"), (1.0, "")],
        Unit::Seconds => &[(3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms")],
    };
    let fits = steps.iter().find(|(size, _)| most >= *size);
    *fits.unwrap_or(&steps[steps.len() - 1])
}

/// A value with its unit.
pub fn say(unit: Unit, value: f64) -> String {
    let most = if value == 0.0 { 1.0 } else { value.abs() };
    let (size, word) = scaled(unit, most);
    format!("{} {word}", short(value / size))
        .trim_end()
        .to_string()
}

/// A step between ticks that people count in, no smaller than `least`: 1, 2 or 5 times a power of ten.
fn nice(least: f64) -> f64 {
    let power = 10f64.powf(least.log10().floor());
    let factors = [1.0, 2.0, 5.0, 10.0];
    let fits = factors.iter().find(|&f| f * power >= least * 0.999_999);
    fits.unwrap_or(&10.0) * power
}

/// The same of time: also quarters and halves of minutes and hours.
fn nice_time(least: f64) -> f64 {
    let steps = [
        1.0, 2.0, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 900.0, 1800.0, 3600.0, 7200.0,
        10_800.0, 21_600.0, 43_200.0, 86_400.0,
    ];
    match steps.iter().find(|&&step| step >= least) {
        Some(step) if least >= 0.5 => *step,
        Some(_) => nice(least),
        None => nice(least / 86_400.0) * 86_400.0,
    }
}

fn multiples(from: f64, to: f64, step: f64) -> Vec<f64> {
    let first = (from / step - 1e-6).ceil() as i64;
    let last = (to / step + 1e-6).floor() as i64;
    // No axis has more; what is not a number has none.
    (first..=last.min(first + 100))
        .map(|n| n as f64 * step)
        .collect()
}

/// Ticks of a time axis, with their words.
fn time_ticks(from: f64, to: f64) -> Vec<(f64, String)> {
    let step = nice_time((to - from).max(1e-3) / 10.0);
    let word = |t: f64| match t {
        t if step < 1.0 => format!("{} s", short(t)),
        t if t < 60.0 => format!("{t:.0} s"),
        t if t < 3600.0 => format!("{:.0}:{:02.0} min", (t / 60.0).floor(), t % 60.0),
        t => format!("{:.0}:{:02.0} h", (t / 3600.0).floor(), (t % 3600.0) / 60.0),
    };
    multiples(from, to, step)
        .into_iter()
        .map(|t| (t, word(t)))
        .collect()
}

/// The vertical axis: its ends, whether it is logarithmic, and its ticks.
struct Scale {
    low: f64,
    high: f64,
    is_log: bool,
    ticks: Vec<(f64, String)>,
}

impl Scale {
    fn of(chart: &Chart) -> Scale {
        let steps = || chart.series.iter().flat_map(|s| &s.steps);
        let levels = || chart.levels.iter().map(|l| l.at);
        let values = || {
            steps()
                .map(|s| s.high)
                .chain(levels())
                .filter(|v| v.is_finite())
        };
        let most = values().fold(0.0, f64::max);
        if chart.unit == Unit::Millis {
            let positive = values().filter(|&v| v > 0.0);
            let least = positive.fold(f64::INFINITY, f64::min).min(most.max(1.0));
            let low = 10f64.powf(least.max(1e-3).log10().floor());
            let high = 10f64.powf(most.max(low * 10.0).log10().ceil());
            let decades = (high / low).log10().round() as i32;
            let ticks = (0..=decades).map(|n| low * 10f64.powi(n));
            return Scale {
                low,
                high,
                is_log: true,
                ticks: ticks.map(|v| (v, say(chart.unit, v))).collect(),
            };
        }
        let most = if most > 0.0 { most } else { 1.0 };
        let (size, word) = scaled(chart.unit, most);
        let step = nice(most / size / 4.0);
        let high = (most / size / step - 1e-6).ceil() * step;
        let ticks = multiples(0.0, high, step).into_iter();
        let said = |v: f64| format!("{} {word}", short(v)).trim_end().to_string();
        Scale {
            low: 0.0,
            high: high * size,
            is_log: false,
            ticks: ticks.map(|v| (v * size, said(v))).collect(),
        }
    }

    /// From the bottom, between 0 and 1.
    fn place(&self, value: f64) -> f64 {
        let share = if self.is_log {
            (value.max(self.low) / self.low).log10() / (self.high / self.low).log10()
        } else {
            (value - self.low) / (self.high - self.low)
        };
        share.clamp(0.0, 1.0)
    }
}

/// Where a panel is drawn, and what of time it shows.
struct Frame {
    top: f64,
    bottom: f64,
    from: f64,
    to: f64,
}

impl Frame {
    fn x(&self, t: f64) -> f64 {
        let share = (t - self.from) / (self.to - self.from).max(1e-9);
        LEFT + share.clamp(0.0, 1.0) * (WIDTH - LEFT - RIGHT)
    }

    fn bands(&self, out: &mut String, bands: &[Band]) {
        for band in bands {
            if band.to < self.from || band.from > self.to {
                continue;
            }
            // What is too short to be seen is still to be seen.
            let (x, end) = (self.x(band.from), self.x(band.to));
            let width = (end - x).max(1.5);
            let class = if band.is_stop { "stop" } else { "band" };
            let _ = write!(
                out,
                "<rect class=\"{class}\" x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\"><title>{}</title></rect>",
                at(x),
                at(self.top),
                at(width),
                at(self.bottom - self.top),
                escape(&band.name)
            );
        }
    }

    fn times(&self, out: &mut String) {
        for (t, word) in time_ticks(self.from, self.to) {
            let x = at(self.x(t));
            let _ = write!(
                out,
                "<path class=\"grid\" d=\"M{x} {}V{}\"/><text x=\"{x}\" y=\"{}\" text-anchor=\"middle\">{word}</text>",
                at(self.top),
                at(self.bottom + 4.0),
                at(self.bottom + 18.0)
            );
        }
    }
}

fn title(out: &mut String, top: f64, text: &str) {
    let _ = write!(
        out,
        "<text class=\"title\" x=\"{}\" y=\"{}\">{}</text>",
        at(LEFT),
        at(top + 20.0),
        escape(text)
    );
}

/// How wide a word is, more or less: there is nobody to ask.
fn width_of(word: &str) -> f64 {
    7.2 * word.chars().count() as f64
}

fn legend(out: &mut String, top: f64, series: &[Series]) {
    let mut x = WIDTH - RIGHT;
    for series in series.iter().rev() {
        let name: String = series.name.chars().take(24).collect();
        x -= width_of(&name);
        let colour = series.colour % COLOURS;
        let _ = write!(
            out,
            "<rect class=\"f{colour}\" x=\"{}\" y=\"{}\" width=\"10\" height=\"10\"/><text class=\"key\" x=\"{}\" y=\"{}\">{}</text>",
            at(x - 15.0),
            at(top + 11.0),
            at(x),
            at(top + 20.0),
            escape(&name)
        );
        x -= 32.0;
    }
}

/// Stretches of steps without a gap.
fn unbroken(steps: &[Step]) -> Vec<Vec<Step>> {
    let mut runs: Vec<Vec<Step>> = Vec::new();
    for &step in steps {
        let is_number = [step.from, step.to, step.low, step.high]
            .iter()
            .all(|v| v.is_finite());
        if !is_number || step.to < step.from {
            continue;
        }
        match runs.last_mut() {
            Some(run)
                if run
                    .last()
                    .is_some_and(|last| (last.to - step.from).abs() < 1e-6) =>
            {
                run.push(step);
            }
            _ => runs.push(vec![step]),
        }
    }
    runs
}

fn draw(out: &mut String, frame: &Frame, scale: &Scale, series: &Series) {
    let colour = series.colour % COLOURS;
    let y = |value: f64| frame.bottom - scale.place(value) * (frame.bottom - frame.top);
    let mut path = String::new();
    for run in unbroken(&series.steps) {
        let run: Vec<_> = run
            .into_iter()
            .filter(|s| s.to >= frame.from && s.from <= frame.to)
            .collect();
        let Some(first) = run.first() else { continue };
        let _ = write!(path, "M{} {}", at(frame.x(first.from)), at(y(first.high)));
        for step in &run {
            let _ = write!(path, "V{}H{}", at(y(step.high)), at(frame.x(step.to)));
        }
        if series.shape == Shape::Area {
            for step in run.iter().rev() {
                let _ = write!(path, "V{}H{}", at(y(step.low)), at(frame.x(step.from)));
            }
            path.push('Z');
        }
    }
    if path.is_empty() {
        return;
    }
    let class = match series.shape {
        Shape::Area => format!("area f{colour}"),
        Shape::Line => format!("line s{colour}"),
    };
    let _ = write!(
        out,
        "<path class=\"{class}\" d=\"{path}\"><title>{}</title></path>",
        escape(&series.name)
    );
}

fn chart(out: &mut String, top: f64, chart: &Chart) {
    let scale = Scale::of(chart);
    let frame = Frame {
        top: top + TOP,
        bottom: top + CHART - BOTTOM,
        from: chart.from,
        to: chart.to,
    };
    title(out, top, &chart.title);
    legend(out, top, &chart.series);
    frame.times(out);
    let y = |value: f64| frame.bottom - scale.place(value) * (frame.bottom - frame.top);
    for (value, word) in &scale.ticks {
        let _ = write!(
            out,
            "<path class=\"grid\" d=\"M{} {y}H{}\"/><text x=\"{}\" y=\"{}\" text-anchor=\"end\">{word}</text>",
            at(LEFT),
            at(WIDTH - RIGHT),
            at(LEFT - 8.0),
            at(y(*value) + 4.0),
            y = at(y(*value)),
        );
    }
    frame.bands(out, &chart.bands);
    for series in &chart.series {
        draw(out, &frame, &scale, series);
    }
    for level in &chart.levels {
        let _ = write!(
            out,
            "<path class=\"mark\" d=\"M{} {y}H{}\"/><text class=\"marked\" x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>",
            at(LEFT),
            at(WIDTH - RIGHT),
            at(WIDTH - RIGHT - 4.0),
            at(if y(level.at) < frame.top + 16.0 {
                y(level.at) + 14.0
            } else {
                y(level.at) - 5.0
            }),
            escape(&level.name),
            y = at(y(level.at)),
        );
    }
}

fn strip(out: &mut String, top: f64, strip: &Strip) {
    let frame = Frame {
        top: top + TOP - 6.0,
        bottom: top + STRIP - BOTTOM + 8.0,
        from: strip.from,
        to: strip.to,
    };
    title(out, top, &strip.title);
    frame.times(out);
    for (step, colour, name) in &strip.spans {
        let (x, end) = (frame.x(step.from), frame.x(step.to));
        let width = (end - x).max(1.5);
        let name = escape(name);
        let _ = write!(
            out,
            "<rect class=\"f{}\" x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\"><title>{name}</title></rect>",
            colour % COLOURS,
            at(x),
            at(frame.top),
            at(width),
            at(frame.bottom - frame.top)
        );
        if width > width_of(&name) + 10.0 {
            let _ = write!(
                out,
                "<text class=\"word\" x=\"{}\" y=\"{}\">{name}</text>",
                at(x + 6.0),
                at((frame.top + frame.bottom) / 2.0 + 4.0)
            );
        }
    }
    frame.bands(out, &strip.bands);
}

impl Panel {
    fn height(&self) -> f64 {
        match self {
            Panel::Chart(_) => CHART,
            Panel::Strip(_) => STRIP,
        }
    }

    fn draw(&self, out: &mut String, top: f64) {
        match self {
            Panel::Chart(c) => chart(out, top, c),
            Panel::Strip(s) => strip(out, top, s),
        }
    }

    fn title(&self) -> &str {
        match self {
            Panel::Chart(c) => &c.title,
            Panel::Strip(s) => &s.title,
        }
    }
}

/// One panel, for a page that has [`STYLE`].
pub fn panel(panel: &Panel) -> String {
    let mut out = format!(
        "<svg class=\"plot\" xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{}\">",
        at(WIDTH),
        at(panel.height()),
        escape(panel.title())
    );
    panel.draw(&mut out, 0.0);
    out.push_str("</svg>\n");
    out
}

/// A file of its own: the panels one below the other.
pub fn document(name: &str, panels: &[Panel]) -> String {
    let height: f64 = panels.iter().map(Panel::height).sum::<f64>() + 34.0;
    let mut out = format!(
        "<svg class=\"plot\" xmlns=\"http://www.w3.org/2000/svg\" width=\"{w}\" height=\"{h}\" viewBox=\"0 0 {w} {h}\">\n\
         <style>{STYLE}</style>\n<rect class=\"paper\" width=\"{w}\" height=\"{h}\"/>\
         <text class=\"title\" x=\"{x}\" y=\"24\">{}</text>\n",
        escape(name),
        w = at(WIDTH),
        h = at(height),
        x = at(LEFT),
    );
    let mut top = 34.0;
    for panel in panels {
        panel.draw(&mut out, top);
        out.push('\n');
        top += panel.height();
    }
    out.push_str("</svg>\n");
    out
}

#[cfg(test)]
mod tests;
