// SPDX-License-Identifier: MIT OR Apache-2.0
//! How much of the processors that it wants a guest gets, and so what its heartbeats are worth.
//!
//! Patience is counted in heartbeats, which an ordinary thread of the guest makes. But that thread asks for next to nothing, and gets
//! it where the others wait: on a host whose processors are wanted ten times over, ten seconds of heartbeats are one second of
//! work. The host's kernel says for each thread how long it ran and how long it could have run and did not
//! (Documentation/scheduler/sched-stats.rst, `/proc/PID/task/TID/schedstat`); a heartbeat counts for as much as the first is of both.
//! An idle guest wants nothing and lacks nothing.
//!
//! Heartbeats that do not count are sign of life and nothing else: neither the oracle nor gates nor the watchdog's patience see them.

use std::collections::HashMap;
use std::fs;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// All of what it wants.
const WHOLE: u32 = 1024;
/// The least: what hangs is found in the end.
const LEAST: u32 = WHOLE / 64;
/// Over how long it is measured: several turns of all who want a processor.
const WINDOW: Duration = Duration::from_millis(500);
/// Part of the window that counts as having run: who wants next to nothing waits longer than he runs, and lacks nothing.
const IDLE: u32 = 10;
/// Part of the whole below which a guest is starved.
const STARVED: f64 = 0.5;

/// What a heartbeat is worth at present.
#[derive(Debug)]
pub struct Pace {
    share: AtomicU32,
    owed: AtomicU32,
}

impl Default for Pace {
    fn default() -> Self {
        Self { share: AtomicU32::new(WHOLE), owed: AtomicU32::new(0) }
    }
}

impl Pace {
    /// From here on heartbeats are worth so much, 0 to 1.
    pub fn set(&self, share: f64) {
        let share = (share * f64::from(WHOLE)) as u32;
        self.share.store(share.clamp(LEAST, WHOLE), Ordering::Relaxed);
    }

    /// A heartbeat; whether it counts. Heartbeats come one after the other.
    pub fn beat(&self) -> bool {
        let owed = self.owed.load(Ordering::Relaxed) + self.share.load(Ordering::Relaxed);
        self.owed.store(owed % WHOLE, Ordering::Relaxed);
        owed >= WHOLE
    }
}

/// Measures a guest's share.
#[derive(Debug)]
pub(super) struct Starvation {
    at: Instant,
    /// Time that it ran and that it waited, by thread, in nanoseconds.
    threads: HashMap<u32, (u64, u64)>,
    share: f64,
    /// Part of the last minute's heartbeats that counted, about.
    lately: f64,
}

impl Starvation {
    /// From now on.
    pub(super) fn new(now: Instant) -> Self {
        Self { at: now, threads: HashMap::new(), share: 1.0, lately: 1.0 }
    }

    /// Looks at the threads of the machine's process, if it is one of its own, and of this one, which has the device; if it is time.
    pub(super) fn look(&mut self, now: Instant, machine: Option<u32>, pace: &Pace) {
        let window = now.saturating_duration_since(self.at);
        if window < WINDOW {
            return;
        }
        self.at = now;
        let threads: HashMap<u32, (u64, u64)> =
            [Some(std::process::id()), machine].into_iter().flatten().flat_map(threads).collect();
        let (mut ran, mut waited) = (0, 0);
        for (thread, (run, wait)) in &threads {
            let (before_run, before_wait) = self.threads.get(thread).copied().unwrap_or_default();
            ran += run.saturating_sub(before_run);
            waited += wait.saturating_sub(before_wait);
        }
        let first = self.threads.is_empty();
        self.threads = threads;
        if first {
            return;
        }
        self.share = share(ran, waited, window);
        let weight = (window.as_secs_f64() / 60.0).min(1.0);
        self.lately += (self.share - self.lately) * weight;
        pace.set(self.share);
    }

    /// How long something takes at present that takes so long when the guest gets all that it wants.
    pub(super) fn longer(&self, time: Duration) -> Duration {
        time.mul_f64(1.0 / self.share.clamp(f64::from(LEAST) / f64::from(WHOLE), 1.0))
    }

    /// Part of what it wants that the guest got in the last minute, if that is little.
    pub(super) fn starved(&self) -> Option<f64> {
        (self.lately < STARVED).then_some(self.lately)
    }
}

fn share(ran: u64, waited: u64, window: Duration) -> f64 {
    let idle = window.as_nanos() as f64 / f64::from(IDLE);
    let had = ran as f64 + idle;
    had / (had + waited as f64)
}

/// What a process's threads have run and waited; nothing where the kernel does not say.
fn threads(process: u32) -> Vec<(u32, (u64, u64))> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let times = |text: &str| {
        let mut words = text.split_whitespace().map(str::parse);
        Some((words.next()?.ok()?, words.next()?.ok()?))
    };
    tasks
        .filter_map(|task| {
            let thread = task.file_name().to_str()?.parse().ok()?;
            Some((thread, times(&fs::read_to_string(task.path().join("schedstat")).ok()?)?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_heartbeat_counts_for_what_the_guest_gets() {
        let pace = Pace::default();
        let count = |beats: u32| (0..beats).filter(|_| pace.beat()).count();
        assert_eq!(count(100), 100);
        for (share, counted) in [(0.5, 49..=51), (0.1, 9..=11), (0.0, 1..=2), (7.0, 100..=100)] {
            pace.set(share);
            let got = count(100);
            assert!(counted.contains(&got), "{share}: {got}");
        }
    }

    #[test]
    fn who_wants_nothing_lacks_nothing() {
        let window = Duration::from_millis(500);
        let ms = |n: u64| n * 1_000_000;
        assert!(share(0, 0, window) > 0.99);
        // A thread that wakes ten times a second on a busy host.
        assert!(share(ms(1), ms(10), window) > 0.8);
        // Two processors that run all the time, and four that are wanted by two.
        assert!(share(ms(1000), 0, window) > 0.99);
        assert!((0.45..0.6).contains(&share(ms(1000), ms(1000), window)));
        assert!(share(ms(60), ms(1940), window) < 0.1);
    }

    #[test]
    fn this_process_is_measured() {
        let begin = Instant::now();
        let mut starvation = Starvation::new(begin);
        let pace = Pace::default();
        assert!(threads(std::process::id()).iter().any(|(_, (ran, _))| *ran > 0), "no schedstat");
        starvation.look(begin, None, &pace);
        assert!(starvation.threads.is_empty(), "too early");
        starvation.look(begin + WINDOW, None, &pace);
        assert!(!starvation.threads.is_empty());
        starvation.look(begin + 2 * WINDOW, None, &pace);
        assert!(starvation.share > 0.0 && starvation.share <= 1.0);
        assert!(threads(0).is_empty());
    }

    #[test]
    fn starved_is_who_was_so_for_long() {
        let mut starvation = Starvation::new(Instant::now());
        let second = Duration::from_secs(1);
        assert_eq!(starvation.longer(second), second);
        starvation.share = 0.0;
        assert_eq!(starvation.longer(second), 64 * second);
        starvation.lately = 0.6;
        assert_eq!(starvation.starved(), None);
        starvation.lately = 0.2;
        assert_eq!(starvation.starved(), Some(0.2));
    }
}
