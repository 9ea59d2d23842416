// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who waits for whom: from what a driver says of its own locks, where it does.
//!
//! A driver that exports `hmm_lock_report()` is asked when the guest looks hung (by the witness), and prints a line for each
//! task that waits for one of its locks or holds one:
//!
//! ```text
//! hmm_lock: COMM/PID waits for LOCK (read|write|exclusive) since NANOSECONDS
//! hmm_lock: COMM/PID holds LOCK (read|write|exclusive) since NANOSECONDS
//! ```
//!
//! A waiter waits for every holder that it cannot be beside, and, since a lock is fair, for whoever has waited longer and cannot
//! be beside it. A lock whose name begins with `srcu` is not: readers do not wait for a grace period that waits for others.

use crate::console::lines::printk;

/// Lines taken.
const MAX_FACTS: usize = 256;
/// Longest circle that is looked for.
const MAX_CIRCLE: usize = 16;

/// How a lock is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Read,
    Write,
    Exclusive,
}

/// A task and one of its locks.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Fact {
    comm: String,
    pid: u32,
    lock: String,
    mode: Mode,
    waits: bool,
    since: u64,
}

/// A task that waits for another.
#[derive(Clone, Copy, Debug)]
struct Edge<'a> {
    waiter: &'a Fact,
    /// Holds the lock, or waits for it too, and before.
    other: &'a Fact,
}

fn fact(line: &str) -> Option<Fact> {
    let text = printk(line).map_or(line, |(_, text)| text);
    let rest = text.split_once("hmm_lock: ")?.1;
    // A task's name may have blanks in it.
    let (who, waits, rest) = match rest.split_once(" waits for ") {
        Some((who, rest)) => (who, true, rest),
        None => rest.split_once(" holds ").map(|(who, rest)| (who, false, rest))?,
    };
    let (comm, pid) = who.rsplit_once('/')?;
    let words: Vec<&str> = rest.split_whitespace().collect();
    let [lock, mode, "since", since] = words[..] else { return None };
    let mode = match mode {
        "(read)" => Mode::Read,
        "(write)" => Mode::Write,
        "(exclusive)" => Mode::Exclusive,
        _ => return None,
    };
    Some(Fact {
        comm: comm.to_owned(),
        pid: pid.parse().ok()?,
        lock: lock.to_owned(),
        mode,
        waits,
        since: since.parse().ok()?,
    })
}

fn edges(facts: &[Fact]) -> Vec<Edge<'_>> {
    let mut edges = Vec::new();
    for waiter in facts.iter().filter(|fact| fact.waits) {
        let blocks = |other: &&Fact| {
            let same = other.lock == waiter.lock && !std::ptr::eq(*other, waiter);
            let apart = waiter.mode != Mode::Read || other.mode != Mode::Read;
            // Who is in an SRCU section was never held up by those that wait for all sections to end.
            let fair = !waiter.lock.starts_with("srcu");
            let before = !other.waits || fair && other.since < waiter.since;
            same && apart && before
        };
        edges.extend(facts.iter().filter(blocks).map(|other| Edge { waiter, other }));
    }
    edges
}

/// The shortest circle of tasks that wait for each other.
fn circle<'a>(edges: &[Edge<'a>]) -> Option<Vec<Edge<'a>>> {
    let mut best: Option<Vec<Edge<'a>>> = None;
    for first in edges {
        let mut paths = vec![vec![*first]];
        // Breadth first: each task once, so that it ends.
        let mut seen = vec![first.waiter.pid];
        for _ in 0..MAX_CIRCLE {
            let closed =
                paths.iter().find(|path| path.last().is_some_and(|edge| edge.other.pid == first.waiter.pid));
            if let Some(path) = closed {
                if best.as_ref().is_none_or(|best| path.len() < best.len()) {
                    best = Some(path.clone());
                }
                break;
            }
            let mut longer = Vec::new();
            for path in &paths {
                let Some(last) = path.last() else { continue };
                if seen.contains(&last.other.pid) {
                    continue;
                }
                seen.push(last.other.pid);
                for next in edges.iter().filter(|edge| edge.waiter.pid == last.other.pid) {
                    let mut path = path.clone();
                    path.push(*next);
                    longer.push(path);
                }
            }
            paths = longer;
        }
    }
    best
}

/// The circle in which tasks wait for each other, in one sentence that begins with the task whose name comes first; and its lines.
/// None if what was printed shows none.
#[must_use]
pub fn deadlock(printed: &[String], roles: &[(u32, String)]) -> Option<(String, Vec<String>)> {
    let facts: Vec<Fact> = printed.iter().filter_map(|line| fact(line)).take(MAX_FACTS).collect();
    let edges = edges(&facts);
    let mut circle = circle(&edges)?;
    let name = |fact: &Fact| {
        let role = roles.iter().find(|(pid, _)| *pid == fact.pid).map(|(_, role)| role.as_str());
        role.map_or_else(|| format!("{} (pid {})", fact.comm, fact.pid), str::to_owned)
    };
    let start = (0..circle.len()).min_by_key(|index| name(circle[*index].waiter)).unwrap_or(0);
    circle.rotate_left(start);
    let way = |mode: Mode| match mode {
        Mode::Read => " for read",
        Mode::Write => " for write",
        Mode::Exclusive => "",
    };
    let lines: Vec<String> = circle
        .iter()
        .map(|Edge { waiter, other }| {
            let (pid, lock, other_name) = (waiter.pid, &waiter.lock, name(other));
            let task = format!("{} ({}/{pid})", name(waiter), waiter.comm);
            let how = if other.pid == pid {
                "which it holds itself".to_owned()
            } else if other.waits {
                format!("behind {other_name}, who wants it{}", way(other.mode))
            } else {
                format!("held by {other_name}")
            };
            format!("{task} waits for {lock}{}, {how}", way(waiter.mode))
        })
        .collect();
    let sentence: Vec<String> = circle
        .iter()
        .map(|Edge { waiter, other }| {
            let whom = if waiter.pid == other.pid { "itself".to_owned() } else { name(other) };
            format!("{} waits for {whom} ({})", name(waiter), waiter.lock)
        })
        .collect();
    Some((sentence.join(", "), lines))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Vec<String> {
        text.lines().map(|line| format!("[   12.345678] hmm_vgpu: {}", line.trim())).collect()
    }

    const THREE: &str = "hmm_lock: cast A/101 holds mirrors_sem:3 (read) since 100
        hmm_lock: cast A/101 waits for device_lock (exclusive) since 400
        hmm_lock: cast B/102 waits for mirrors_sem:3 (write) since 200
        hmm_lock: cast C/103 holds device_lock (exclusive) since 50
        hmm_lock: cast C/103 waits for mirrors_sem:3 (read) since 300
        hmm_lock: bystander/104 waits for device_lock (exclusive) since 500";

    #[test]
    fn the_three_of_the_thread() {
        let roles = [(101, "A".to_owned()), (102, "B".to_owned()), (103, "C".to_owned())];
        let (sentence, told) = deadlock(&lines(THREE), &roles).unwrap();
        assert_eq!(
            sentence,
            "A waits for C (device_lock), C waits for B (mirrors_sem:3), B waits for A (mirrors_sem:3)"
        );
        assert_eq!(
            told,
            [
                "A (cast A/101) waits for device_lock, held by C",
                "C (cast C/103) waits for mirrors_sem:3 for read, behind B, who wants it for write",
                "B (cast B/102) waits for mirrors_sem:3 for write, held by A",
            ]
        );
    }

    #[test]
    fn without_the_writer_there_is_no_circle() {
        let without: Vec<String> = lines(THREE).into_iter().filter(|line| !line.contains("/102")).collect();
        assert_eq!(deadlock(&without, &[]), None);
        // A reader that was there first does not wait for a writer that came later.
        let late = THREE.replace("(write) since 200", "(write) since 350");
        assert_eq!(deadlock(&lines(&late), &[]), None);
        // Nor does one in an SRCU section, whoever waits for a grace period.
        assert_eq!(deadlock(&lines(&THREE.replace("mirrors_sem", "srcu")), &[]), None);
    }

    #[test]
    fn a_task_that_waits_for_itself() {
        let text = "hmm_lock: kworker/0:1/7 holds sem (read) since 1\nhmm_lock: kworker/0:1/7 waits for sem (write) since 2";
        let (sentence, told) = deadlock(&lines(text), &[]).unwrap();
        assert_eq!(sentence, "kworker/0:1 (pid 7) waits for itself (sem)");
        assert_eq!(
            told,
            ["kworker/0:1 (pid 7) (kworker/0:1/7) waits for sem for write, which it holds itself"]
        );
    }

    #[test]
    fn nonsense_is_no_fact() {
        for bad in [
            "hmm_lock: none",
            "hmm_lock: a waits for b (read) since 1",
            "hmm_lock: a/1 waits for b (maybe) since 1",
            "hmm_lock: a/1 holds b (read)",
            "hmm_lock: a/x holds b (read) since 1",
            "something else",
        ] {
            assert_eq!(fact(bad), None, "{bad}");
        }
    }
}
