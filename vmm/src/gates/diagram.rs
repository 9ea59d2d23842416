// SPDX-License-Identifier: MIT OR Apache-2.0
//! Draws what happened in a repetition: a column for each who took part, in the order in which it was reported.

use std::fmt::Write as _;

use super::engine::{Line, ScenarioResult};

/// Widest column; what is longer goes on in the next line.
const WIDEST: usize = 34;
/// Most columns: whoever comes later shares the last.
const COLUMNS: usize = 8;

/// The page of a repetition: a heading, and the diagram.
#[must_use]
pub fn page(result: &ScenarioResult, command: &str) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write!(out, "`{command}`");
    match result.violated_in {
        Some(repetition) => {
            let _ = write!(out, ", repetition {repetition}, in which a violation was found");
        }
        None => {
            let _ = write!(out, ", the last of {} repetitions", result.repetitions);
        }
    }
    if let Some(order) = &result.order {
        let _ = write!(out, "; order `{order}`");
    }
    let _ = write!(out, ":\n\n```text\n{}```\n", lines(&result.story));
    out
}

/// The diagram.
#[must_use]
pub fn lines(story: &[Line]) -> String {
    // What came before anybody who is part of it is another story.
    let begin = story.iter().position(|line| line.who != "others").unwrap_or(0);
    let story = &story[begin..];
    let mut who: Vec<&str> = Vec::new();
    // The scenario stands at the left.
    if story.iter().any(|line| line.who == "scenario") {
        who.push("scenario");
    }
    for line in story {
        if !who.contains(&line.who.as_str()) && who.len() < COLUMNS {
            who.push(&line.who);
        }
    }
    let column =
        |line: &Line| who.iter().position(|name| *name == line.who).unwrap_or(who.len().saturating_sub(1));
    let widths: Vec<usize> = (0..who.len())
        .map(|number| {
            let texts =
                story.iter().filter(|line| column(line) == number).map(|line| line.what.chars().count());
            texts.max().unwrap_or(0).max(who[number].chars().count()).min(WIDEST)
        })
        .collect();
    let mut out = String::new();
    let heads: Vec<String> = who.iter().map(|name| (*name).to_owned()).collect();
    row(&mut out, &heads, &widths);
    row(&mut out, &widths.iter().map(|width| "-".repeat(*width)).collect::<Vec<_>>(), &widths);
    for line in story {
        let at = column(line);
        for part in folded(&line.what, WIDEST) {
            let mut cells = vec![String::new(); who.len()];
            if let Some(cell) = cells.get_mut(at) {
                *cell = part;
            }
            row(&mut out, &cells, &widths);
        }
    }
    out
}

fn row(out: &mut String, cells: &[String], widths: &[usize]) {
    let cells: Vec<String> = cells.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
    out.push_str(cells.join("   ").trim_end());
    out.push('\n');
}

/// Cut at blanks, so that each part fits.
fn folded(text: &str, width: usize) -> Vec<String> {
    let mut parts = vec![String::new()];
    for word in text.split_whitespace() {
        let long = parts
            .last()
            .is_some_and(|part| !part.is_empty() && part.chars().count() + 1 + word.chars().count() > width);
        if long {
            // What goes on stands further in.
            parts.push(" ".to_owned());
        }
        if let Some(part) = parts.last_mut() {
            if !part.is_empty() {
                part.push(' ');
            }
            part.push_str(word);
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(who: &str, what: &str) -> Line {
        Line { beat: 1, who: who.into(), what: what.into() }
    }

    #[test]
    fn columns_are_in_the_order_of_appearance_behind_the_scenario() {
        let story = [
            line("A", "waits at unlocked"),
            line("B", "goes on"),
            line("scenario", "open unlocked"),
            line("A", "a text that is so long that it has to go on in the next line"),
        ];
        let expected = "\
scenario        A                                    B
-------------   ----------------------------------   -------
                waits at unlocked
                                                     goes on
open unlocked
                a text that is so long that it has
                  to go on in the next line
";
        assert_eq!(lines(&story), expected);
        assert_eq!(lines(&[]), "\n\n");
    }

    #[test]
    fn a_page_says_which_repetition() {
        let mut result =
            ScenarioResult { repetitions: 3, story: vec![line("A", "x")], ..ScenarioResult::default() };
        assert!(page(&result, "run x").starts_with("`run x`, the last of 3 repetitions:\n\n```text\nA\n"));
        result.violated_in = Some(1);
        result.order = Some("a@A".into());
        assert!(
            page(&result, "run x").contains("repetition 1, in which a violation was found; order `a@A`:")
        );
    }
}
