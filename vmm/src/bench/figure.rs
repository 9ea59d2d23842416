// SPDX-License-Identifier: MIT OR Apache-2.0
//! A measured figure, its goal, and how both are written.

use serde::Serialize;

/// What a ratio is meant to be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Goal {
    /// This or more.
    AtLeast(f64),
    /// This or less.
    AtMost(f64),
}

impl Goal {
    /// Whether a ratio reaches it.
    #[must_use]
    pub(super) fn met(self, ratio: f64) -> bool {
        match self {
            Self::AtLeast(bound) => ratio >= bound,
            Self::AtMost(bound) => ratio <= bound,
        }
    }

    fn text(self) -> String {
        match self {
            Self::AtLeast(bound) => format!(">= {bound}"),
            Self::AtMost(bound) => format!("<= {bound}"),
        }
    }
}

/// A figure: one line of the table, one JSON object.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Figure {
    /// The benchmark it belongs to.
    pub(super) benchmark: &'static str,
    /// Its name, unique in the benchmark.
    pub(super) name: String,
    /// The value.
    pub(super) value: f64,
    /// Of what.
    pub(super) unit: String,
    /// Against what `about` says, if it has something to be held against.
    pub(super) ratio: Option<f64>,
    /// What the ratio is meant to be.
    pub(super) goal: Option<Goal>,
    /// Whether it is; none without a goal.
    pub(super) met: Option<bool>,
    /// What exactly was measured.
    pub(super) about: String,
}

impl Figure {
    /// A figure on its own.
    pub(super) fn new(
        benchmark: &'static str,
        name: impl Into<String>,
        value: f64,
        unit: impl Into<String>,
        about: impl Into<String>,
    ) -> Self {
        Self {
            benchmark,
            name: name.into(),
            value,
            unit: unit.into(),
            ratio: None,
            goal: None,
            met: None,
            about: about.into(),
        }
    }

    /// With a ratio.
    #[must_use]
    pub(super) fn ratio(mut self, ratio: f64) -> Self {
        self.ratio = Some(ratio);
        self.met = self.goal.map(|goal| goal.met(ratio));
        self
    }

    /// With what the ratio is meant to be.
    #[must_use]
    pub(super) fn goal(mut self, goal: Goal) -> Self {
        self.goal = Some(goal);
        self.met = self.ratio.map(|ratio| goal.met(ratio));
        self
    }

    /// As one line of JSON.
    #[must_use]
    pub(super) fn json(&self) -> String {
        // A structure of strings and numbers: this cannot fail.
        serde_json::to_string(self).unwrap_or_default()
    }
}

/// The middle of some samples, or between the two in the middle.
#[must_use]
pub(super) fn median(samples: &[f64]) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = *sorted.get(sorted.len() / 2)?;
    if sorted.len() % 2 == 1 {
        return Some(upper);
    }
    let lower = *sorted.get(sorted.len() / 2 - 1)?;
    Some((lower + upper) / 2.0)
}

/// The median of `a / b`, round by round: what changes slowly on a shared machine falls out.
#[must_use]
pub(super) fn paired_ratio(a: &[f64], b: &[f64]) -> Option<f64> {
    let ratios: Vec<f64> = a.iter().zip(b).filter(|(_, b)| **b > 0.0).map(|(a, b)| a / b).collect();
    median(&ratios)
}

/// The figures as a table for people, with what each benchmark measures below.
#[must_use]
pub(super) fn table(figures: &[Figure]) -> String {
    let head = ["benchmark", "figure", "value", "unit", "ratio", "goal", ""].map(str::to_owned);
    let mut rows = vec![head];
    rows.extend(figures.iter().map(|figure| {
        [
            figure.benchmark.to_owned(),
            figure.name.clone(),
            number(figure.value),
            figure.unit.clone(),
            figure.ratio.map(|ratio| format!("{ratio:.2}")).unwrap_or_default(),
            figure.goal.map(Goal::text).unwrap_or_default(),
            match figure.met {
                Some(true) => "met".to_owned(),
                Some(false) => "NOT MET".to_owned(),
                None => String::new(),
            },
        ]
    }));
    let mut widths = [0; 7];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.len().max(*width);
        }
    }
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            // Numbers to the right.
            if matches!(column, 2 | 4) {
                line.push_str(&format!("{cell:>width$}  "));
            } else {
                line.push_str(&format!("{cell:<width$}  "));
            }
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text.push('\n');
    for figure in figures {
        text.push_str(&format!("{}, {}: {}\n", figure.benchmark, figure.name, figure.about));
    }
    text
}

/// Three digits that count.
fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[5.0]), Some(5.0));
        assert_eq!(median(&[9.0, 1.0, 3.0]), Some(3.0));
        assert_eq!(median(&[4.0, 1.0, 100.0, 2.0]), Some(3.0));
    }

    #[test]
    fn ratios_are_taken_round_by_round() {
        // Each round twice as slow as the one before, for both: the ratio stays.
        assert_eq!(paired_ratio(&[2.0, 4.0, 8.0], &[1.0, 2.0, 4.0]), Some(2.0));
        assert_eq!(paired_ratio(&[1.0, 1.0], &[0.0, 2.0]), Some(0.5));
        assert_eq!(paired_ratio(&[], &[]), None);
    }

    #[test]
    fn goals_include_their_bound() {
        assert!(Goal::AtLeast(0.8).met(0.8) && !Goal::AtLeast(0.8).met(0.79));
        assert!(Goal::AtMost(1.1).met(1.1) && !Goal::AtMost(1.1).met(1.11));
        assert!(!Goal::AtLeast(0.8).met(f64::NAN) && !Goal::AtMost(1.1).met(f64::NAN));
        let figure = Figure::new("b", "n", 1.0, "s", "a");
        assert_eq!(figure.clone().goal(Goal::AtMost(1.1)).met, None);
        assert_eq!(figure.clone().ratio(1.2).met, None);
        assert_eq!(figure.clone().ratio(1.2).goal(Goal::AtMost(1.1)).met, Some(false));
        assert_eq!(figure.goal(Goal::AtMost(1.1)).ratio(1.0).met, Some(true));
    }

    #[test]
    fn json_has_every_field() {
        let figure = Figure::new("boot", "ours", 2.5, "s", "to PID 1").ratio(1.25).goal(Goal::AtMost(1.1));
        let value: serde_json::Value = serde_json::from_str(&figure.json()).unwrap();
        let expected = serde_json::json!({
            "benchmark": "boot", "name": "ours", "value": 2.5, "unit": "s", "ratio": 1.25,
            "goal": { "at_most": 1.1 }, "met": false, "about": "to PID 1",
        });
        assert_eq!(value, expected);
        let plain = Figure::new("faults", "x", 1.0, "faults/s", "").json();
        assert!(plain.contains(r#""ratio":null,"goal":null,"met":null"#), "{plain}");
        assert!(!plain.contains('\n'));
    }

    #[test]
    fn a_missed_goal_is_seen_in_the_table() {
        let figures = [
            Figure::new("bandwidth", "copy", 5.126, "GiB/s", "c").ratio(0.5).goal(Goal::AtLeast(0.8)),
            Figure::new("faults", "one-queue", 1234.5, "faults/s", "f"),
        ];
        let text = table(&figures);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[1], "bandwidth  copy        5.13  GiB/s      0.50  >= 0.8  NOT MET");
        assert_eq!(lines[2], "faults     one-queue   1234  faults/s");
        assert_eq!(lines.last(), Some(&"faults, one-queue: f"));
    }
}
