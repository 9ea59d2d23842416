// SPDX-License-Identifier: MIT OR Apache-2.0
//! How much of the processors that it wants a guest gets, and so what its heartbeats are worth.
//!
//! Patience is counted in heartbeats, which an ordinary thread of the guest makes. But that thread asks for next to nothing, and gets
//! it where the others wait: on a host whose processors are wanted ten times over, ten seconds of heartbeats are one second of
//! work. The host's kernel says for each thread how long it ran and how long it could have run and did not
//! (Documentation/scheduler/sched-stats.rst, `/proc/PID/task/TID/schedstat`); a heartbeat counts for as much as the first is of both.
//! An idle guest wants nothing and lacks nothing: its heartbeats are worth no less than the part of the time in which no thread
//! waited. What a hypervisor under this host takes away is not seen.
//!
//! Heartbeats that do not count are sign of life, and time to gates, which the guest counts itself; neither the oracle nor the
//! watchdog's patience sees them.

use std::collections::{HashMap, VecDeque};
use std::fs;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// All of what it wants.
const WHOLE: u32 = 1024;
/// The least: what hangs is found in the end.
const LEAST: u32 = WHOLE / 64;
/// How often it is measured.
const EVERY: Duration = Duration::from_millis(500);
/// Over how long heartbeats are weighed. A thread that waits is booked when it gets to run, so this is longer than it waits at a time.
const WINDOW: Duration = Duration::from_secs(5);
/// How far back it is known.
const MEMORY: Duration = Duration::from_secs(300);
/// Part of the time that counts as having run: who wants next to nothing waits longer than he runs, and lacks nothing.
const IDLE: f64 = 0.1;

/// What a heartbeat is worth at present.
#[derive(Debug)]
pub struct Pace {
    share: AtomicU32,
    owed: AtomicU32,
}

impl Default for Pace {
    fn default() -> Self {
        // The first one counts: that there are any is known at once.
        Self { share: AtomicU32::new(WHOLE), owed: AtomicU32::new(WHOLE - 1) }
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

/// What the guest's threads did in a while that ended at `at`.
#[derive(Clone, Copy, Debug)]
struct Span {
    at: Instant,
    length: Duration,
    ran: Duration,
    waited: Duration,
}

/// Measures a guest's share.
#[derive(Debug)]
pub(super) struct Starvation {
    at: Instant,
    /// Time that it ran and that it waited, by thread, in nanoseconds.
    threads: HashMap<u32, (u64, u64)>,
    spans: VecDeque<Span>,
}

impl Starvation {
    /// From now on.
    pub(super) fn new(now: Instant) -> Self {
        Self { at: now, threads: HashMap::new(), spans: VecDeque::new() }
    }

    /// Looks at the threads of the machine's process, if it is one of its own, and of this one, which has the device; if it is time.
    pub(super) fn look(&mut self, now: Instant, machine: Option<u32>, pace: &Pace) {
        let length = now.saturating_duration_since(self.at);
        if length < EVERY {
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
        let (ran, waited) = (Duration::from_nanos(ran), Duration::from_nanos(waited));
        self.spans.push_back(Span { at: now, length, ran, waited });
        while self.spans.front().is_some_and(|span| now.saturating_duration_since(span.at) > MEMORY) {
            self.spans.pop_front();
        }
        pace.set(self.share(now, WINDOW));
    }

    /// Part of what it wanted that the guest got in the last `window`, as far back as it is known.
    pub(super) fn share(&self, now: Instant, window: Duration) -> f64 {
        let recent = |span: &&Span| now.saturating_duration_since(span.at) < window;
        let (mut had, mut wanted, mut waited, mut length) = (0.0, 0.0, 0.0, 0.0);
        for span in self.spans.iter().rev().take_while(recent) {
            let idle = span.length.mul_f64(IDLE).as_secs_f64();
            had += span.ran.as_secs_f64() + idle;
            wanted += span.ran.as_secs_f64() + span.waited.as_secs_f64() + idle;
            waited += span.waited.as_secs_f64();
            length += span.length.as_secs_f64();
        }
        if wanted == 0.0 {
            return 1.0;
        }
        // In the rest of the time none of its threads waited: it did what it had to do, or had nothing to do. So a guest that hangs and
        // sleeps is not taken for a starved one because its few wakings wait long.
        (had / wanted).max(1.0 - waited / length)
    }

    /// How long something takes at present that takes so long when the guest gets all that it wants.
    pub(super) fn longer(&self, now: Instant, time: Duration) -> Duration {
        let least = f64::from(LEAST) / f64::from(WHOLE);
        time.div_f64(self.share(now, WINDOW).clamp(least, 1.0))
    }
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
        let starved = Pace::default();
        starved.set(0.0);
        assert!(starved.beat() && !starved.beat());
    }

    impl Starvation {
        /// So long ran and waited in a span that follows the others; its end.
        fn span(&mut self, length: Duration, ran: Duration, waited: Duration) -> Instant {
            self.at += length;
            self.spans.push_back(Span { at: self.at, length, ran, waited });
            self.at
        }
    }

    /// The share of a guest that ran and waited so many milliseconds of each half second, for a minute.
    fn share_of(ran: u64, waited: u64) -> f64 {
        let mut starvation = Starvation::new(Instant::now());
        for _ in 0..120 {
            starvation.span(EVERY, Duration::from_millis(ran), Duration::from_millis(waited));
        }
        starvation.share(starvation.at, WINDOW)
    }

    #[test]
    fn who_wants_nothing_lacks_nothing() {
        assert!(share_of(0, 0) > 0.99);
        // A thread that wakes ten times a second on a busy host.
        assert!(share_of(1, 10) > 0.8);
        // One that hangs, and whose clock ticks on a host that is very busy.
        assert!(share_of(5, 200) > 0.55);
        // Two processors that run all the time, and four that are wanted by two.
        assert!(share_of(1000, 0) > 0.99);
        assert!((0.45..0.6).contains(&share_of(1000, 1000)));
        assert!(share_of(60, 1940) < 0.1);
    }

    #[test]
    fn a_window_is_what_it_is() {
        let begin = Instant::now();
        let mut starvation = Starvation::new(begin);
        let second = Duration::from_secs(1);
        assert!((starvation.share(begin, WINDOW) - 1.0).abs() < 1e-9, "nothing is known");
        // Starved for a minute, then ten seconds not. What one thread waited for long comes at once.
        let mut now = begin;
        for turn in 1..=60 {
            now = starvation.span(second, second, if turn % 3 == 0 { 60 * second } else { Duration::ZERO });
        }
        assert!(starvation.share(now, WINDOW) < 0.1);
        assert!((10..40).contains(&starvation.longer(now, second).as_secs()));
        for _ in 0..10 {
            now = starvation.span(second, second, Duration::ZERO);
        }
        assert!(starvation.share(now, WINDOW) > 0.99);
        assert!(starvation.share(now, second * 30) < 0.1);
        assert_eq!(starvation.longer(now, second), second);
    }

    #[test]
    fn this_process_is_measured() {
        let begin = Instant::now();
        let mut starvation = Starvation::new(begin);
        let pace = Pace::default();
        starvation.look(begin, None, &pace);
        assert!(starvation.threads.is_empty(), "too early");
        (1..4).for_each(|turn| starvation.look(begin + EVERY * turn, None, &pace));
        // A kernel without CONFIG_SCHED_INFO says nothing.
        if fs::read_to_string("/proc/self/schedstat").is_ok() {
            assert!(starvation.threads.values().any(|(ran, _)| *ran > 0));
            assert_eq!(starvation.spans.len(), 2);
        }
        let share = starvation.share(begin + EVERY * 3, WINDOW);
        assert!(share > 0.0 && share <= 1.0, "{share}");
        assert!(threads(0).is_empty());
    }
}
