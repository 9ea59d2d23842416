// SPDX-License-Identifier: MIT OR Apache-2.0
//! The watchdog: a guest that is lost, and one that lives and gets nothing done.
//!
//! What the guest does is measured in its own heartbeats, which an ordinary thread of it makes: a slow host makes slow
//! heartbeats, and of a starved guest not each counts ([`pace`](super::pace)). Host seconds count only where there is no sign of life at all.

use std::time::{Duration, Instant};

use guest_protocol::{Message, Plan};

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Host time without any sign of life.
    pub silence: Duration,
    /// Host time to PID 1, if the console says nothing either.
    pub boot: Duration,
    /// Host time to PID 1, whatever the console says.
    pub boot_talking: Duration,
    /// Host time without a message where the guest has no heartbeat.
    pub no_heartbeat: Duration,
    /// Heartbeats without progress.
    pub hang_heartbeats: u64,
    /// The same, once there is a reason to suspect a hang.
    pub suspect_heartbeats: u64,
    /// Heartbeats given to the guest to print its stacks, each of the two times that it is asked.
    pub stack_heartbeats: u64,
    /// Heartbeats that a run goes on after its first violation; `None` is to its end. A broken driver may make every
    /// further case wait for its deadline.
    pub violation_heartbeats: Option<u64>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            silence: Duration::from_secs(60),
            boot: Duration::from_secs(120),
            boot_talking: Duration::from_secs(600),
            no_heartbeat: Duration::from_secs(300),
            hang_heartbeats: 300,
            suspect_heartbeats: 50,
            stack_heartbeats: 20,
            violation_heartbeats: Some(100),
        }
    }
}

impl Limits {
    /// The same for a guest to which the host's seconds are so many times shorter. What is counted in the guest's heartbeats stays.
    #[must_use]
    pub fn slower(self, times: u32) -> Self {
        let longer = |time: Duration| time.saturating_mul(times);
        Self {
            silence: longer(self.silence),
            boot: longer(self.boot),
            boot_talking: longer(self.boot_talking),
            no_heartbeat: longer(self.no_heartbeat),
            ..self
        }
    }
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Alarm {
    /// No progress: the guest is to print its stacks.
    AskStacks,
    /// Still none: once more, so that what lasts can be told from what is so by chance.
    AskAgain,
    /// Still none: what the guest printed is the evidence.
    Hang,
    /// The guest is lost.
    Lost(String),
}

/// What is expected of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// PID 1 does not run yet.
    Boot,
    /// Messages are due.
    Work,
    /// A program of the user's runs; it need not say anything.
    Free,
    /// The plan is done; the guest powers off.
    Over,
}

/// Watches one guest.
#[derive(Debug)]
pub struct Watch {
    limits: Limits,
    start: Instant,
    life: Instant,
    console: Instant,
    message: Instant,
    beat: Option<Instant>,
    heartbeat: u64,
    progress_at: u64,
    asked_at: Option<u64>,
    asked_again: bool,
    suspected: bool,
    phase: Phase,
    driver_pending: bool,
    workloads_left: usize,
    exec_pending: bool,
    shell: bool,
}

impl Watch {
    /// Begins with the machine.
    #[must_use]
    pub fn new(limits: Limits, plan: &Plan, now: Instant) -> Self {
        Self {
            limits,
            start: now,
            life: now,
            console: now,
            message: now,
            beat: None,
            heartbeat: 0,
            progress_at: 0,
            asked_at: None,
            asked_again: false,
            suspected: false,
            phase: Phase::Boot,
            driver_pending: plan.load_driver,
            workloads_left: plan.workloads.len(),
            exec_pending: plan.exec.is_some(),
            shell: plan.shell,
        }
    }

    /// What is expected now.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Something was on the console.
    pub fn console(&mut self, now: Instant) {
        self.console = now;
        self.life = now;
    }

    /// The device was used.
    pub fn device(&mut self, now: Instant) {
        self.life = now;
    }

    /// A heartbeat that does not count.
    pub fn alive(&mut self, now: Instant) {
        self.life = now;
        self.beat = self.beat.map(|_| now);
    }

    /// A heartbeat.
    pub fn heartbeat(&mut self, now: Instant, count: u64) {
        if self.beat.is_none() {
            // The guest counted before; progress is due from here on.
            self.progress_at = count;
        }
        self.beat = Some(now);
        self.life = now;
        self.heartbeat = self.heartbeat.max(count);
    }

    /// A message of the agent.
    pub fn message(&mut self, now: Instant, message: &Message) {
        self.life = now;
        self.message = now;
        self.progress_at = self.heartbeat;
        self.asked_at = None;
        self.suspected = false;
        match message {
            Message::ModuleLoaded { module } if module.contains("driver") => self.driver_pending = false,
            Message::WorkloadEnd { .. } => self.workloads_left = self.workloads_left.saturating_sub(1),
            Message::ExecEnd { .. } => self.exec_pending = false,
            _ => {}
        }
        let users = self.exec_pending || self.shell;
        self.phase = match message {
            Message::Done => Phase::Over,
            _ if self.workloads_left == 0 && !self.driver_pending && users => Phase::Free,
            _ => Phase::Work,
        };
    }

    /// A scenario let something go on: a workload that was held until now could not say anything.
    pub fn moves(&mut self) {
        self.progress_at = self.heartbeat;
        self.asked_at = None;
    }

    /// Something was found that is likely to go with a hang: less patience, until the next message.
    pub fn suspect(&mut self) {
        self.suspected = true;
    }

    /// Heartbeats without progress so far.
    #[must_use]
    pub fn stalled(&self) -> u64 {
        self.heartbeat.saturating_sub(self.progress_at)
    }

    /// The guest was asked for its stacks, and its time to answer is not over.
    #[must_use]
    pub fn asked(&self) -> bool {
        self.asked_at.is_some()
    }

    /// The host stood still for `gap`: nothing of that is the guest's.
    pub fn pardon(&mut self, gap: Duration) {
        for then in [&mut self.start, &mut self.life, &mut self.console, &mut self.message] {
            *then += gap;
        }
        if let Some(beat) = &mut self.beat {
            *beat += gap;
        }
    }

    /// A guest that is lost gets `patience` more.
    pub fn grant(&mut self, now: Instant, patience: Duration) {
        let life = now + patience;
        let then = life.checked_sub(self.limits.silence).unwrap_or(now);
        self.life = then;
        self.console = then;
        self.message = then;
        self.beat = self.beat.map(|_| then);
    }

    /// Looks at the clocks. To be called when everything that has arrived is dealt with.
    pub fn check(&mut self, now: Instant) -> Option<Alarm> {
        let limits = self.limits;
        let since = |then: Instant| now.saturating_duration_since(then);
        let lost = |text: String| Some(Alarm::Lost(text));
        if since(self.life) >= limits.silence {
            let seconds = limits.silence.as_secs();
            return lost(match self.phase {
                Phase::Boot => {
                    format!("the guest's kernel did not reach PID 1 and has been silent for {seconds} s")
                }
                Phase::Over => format!("the guest did not power off within {seconds} s"),
                Phase::Work | Phase::Free => format!(
                    "the guest shows no sign of life for {seconds} s: no console output, no heartbeat, no use of the device"
                ),
            });
        }
        match self.phase {
            Phase::Boot => {
                let quiet = since(self.start) >= limits.boot && since(self.console) >= limits.silence / 2;
                if quiet || since(self.start) >= limits.boot_talking {
                    return lost(format!(
                        "the guest's kernel did not reach PID 1 within {} s",
                        since(self.start).as_secs()
                    ));
                }
            }
            Phase::Work | Phase::Free => match self.beat {
                Some(beat) if since(beat) >= limits.silence => {
                    return lost(format!(
                        "the guest's heartbeat stopped {} s ago: none of its threads gets to run",
                        since(beat).as_secs()
                    ));
                }
                None if self.phase == Phase::Work && since(self.message) >= limits.no_heartbeat => {
                    return lost(format!(
                        "the guest has no heartbeat and has said nothing for {} s",
                        since(self.message).as_secs()
                    ));
                }
                _ => {}
            },
            Phase::Over => {
                if since(self.message) >= limits.silence {
                    return lost(format!(
                        "the guest did not power off within {} s",
                        limits.silence.as_secs()
                    ));
                }
            }
        }
        if self.phase != Phase::Work {
            return None;
        }
        let patience = if self.suspected { limits.suspect_heartbeats } else { limits.hang_heartbeats };
        match self.asked_at {
            None if self.stalled() >= patience => {
                (self.asked_at, self.asked_again) = (Some(self.heartbeat), false);
                Some(Alarm::AskStacks)
            }
            Some(asked) if self.heartbeat.saturating_sub(asked) < limits.stack_heartbeats => None,
            Some(_) if self.asked_again => Some(Alarm::Hang),
            Some(_) => {
                (self.asked_at, self.asked_again) = (Some(self.heartbeat), true);
                Some(Alarm::AskAgain)
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runner::RunConfig;
    use crate::runner::plan::plan;

    struct Clock {
        watch: Watch,
        now: Instant,
        beat: u64,
    }

    impl Clock {
        fn new(change: impl Fn(&mut RunConfig)) -> Self {
            let mut config = RunConfig::for_tests();
            change(&mut config);
            let now = Instant::now();
            Self { watch: Watch::new(Limits::default(), &plan(&config), now), now, beat: 0 }
        }
        fn say(&mut self, message: &Message) {
            self.watch.message(self.now, message);
        }
        fn boot(&mut self) {
            self.say(&Message::Booted { kernel: "k".into(), cpus: 1, uptime_ms: 1 });
            self.say(&Message::ModuleLoaded { module: "driver.ko".into() });
        }
        /// Seconds go by, with heartbeats; the first alarm ends it.
        fn beats(&mut self, seconds: u64) -> Option<Alarm> {
            for _ in 0..seconds * 10 {
                self.now += Duration::from_millis(100);
                self.beat += 1;
                self.watch.heartbeat(self.now, self.beat);
                if let Some(alarm) = self.watch.check(self.now) {
                    return Some(alarm);
                }
            }
            None
        }
        fn silence(&mut self, seconds: u64) -> Option<Alarm> {
            (0..seconds).find_map(|_| {
                self.now += Duration::from_secs(1);
                self.watch.check(self.now)
            })
        }
    }

    fn end(workload: &str) -> Message {
        Message::WorkloadEnd {
            workload: workload.into(),
            outcome: guest_protocol::Outcome::Pass,
            seconds: 1.0,
            cases: 1,
            failed: 0,
        }
    }

    #[test]
    fn a_silent_boot_is_lost() {
        let mut clock = Clock::new(|_| {});
        assert_eq!(clock.silence(59), None);
        assert!(matches!(clock.silence(2), Some(Alarm::Lost(text)) if text.contains("PID 1")));
    }

    #[test]
    fn a_boot_that_talks_has_longer_but_not_for_ever() {
        let mut clock = Clock::new(|_| {});
        for second in 0..599 {
            clock.watch.console(clock.now);
            assert_eq!(clock.silence(1), None, "{second}");
        }
        clock.watch.console(clock.now);
        assert!(matches!(clock.silence(1), Some(Alarm::Lost(_))));
    }

    #[test]
    fn no_progress_is_a_hang_after_stacks_were_asked_for() {
        let mut clock = Clock::new(|_| {});
        clock.boot();
        assert_eq!(clock.beats(29), None);
        clock.say(&Message::Progress { workload: "access".into(), done: 1, total: None });
        assert_eq!(clock.beats(29), None);
        assert_eq!(clock.beats(2), Some(Alarm::AskStacks));
        assert_eq!(clock.beats(1), None);
        assert_eq!(clock.beats(2), Some(Alarm::AskAgain));
        assert_eq!(clock.beats(1), None);
        assert_eq!(clock.beats(2), Some(Alarm::Hang));
    }

    #[test]
    fn progress_after_the_question_is_no_hang() {
        let mut clock = Clock::new(|_| {});
        clock.boot();
        assert_eq!(clock.beats(31), Some(Alarm::AskStacks));
        clock.say(&Message::Progress { workload: "access".into(), done: 1, total: None });
        assert_eq!(clock.beats(29), None);
        assert_eq!(clock.beats(2), Some(Alarm::AskStacks));
        assert_eq!(clock.beats(3), Some(Alarm::AskAgain));
        clock.say(&Message::Progress { workload: "access".into(), done: 1, total: None });
        assert_eq!(clock.beats(31), Some(Alarm::AskStacks));
    }

    #[test]
    fn whoever_was_held_at_a_gate_gets_its_time() {
        let mut clock = Clock::new(|_| {});
        clock.boot();
        for _ in 0..3 {
            assert_eq!(clock.beats(31), Some(Alarm::AskStacks));
            clock.watch.moves();
        }
        assert_eq!(clock.beats(29), None);
        assert_eq!(clock.beats(2), Some(Alarm::AskStacks));
        assert_eq!(clock.beats(3), Some(Alarm::AskAgain));
        assert_eq!(clock.beats(3), Some(Alarm::Hang));
    }

    #[test]
    fn a_suspicion_shortens_patience_until_the_next_message() {
        let mut clock = Clock::new(|_| {});
        clock.boot();
        assert_eq!(clock.beats(10), None);
        clock.watch.suspect();
        assert_eq!(clock.beats(1), Some(Alarm::AskStacks));
        clock.say(&Message::Progress { workload: "access".into(), done: 1, total: None });
        assert_eq!(clock.beats(29), None);
    }

    #[test]
    fn a_slow_host_is_not_a_hang() {
        let mut clock = Clock::new(|_| {});
        clock.boot();
        for _ in 0..20 {
            assert_eq!(clock.silence(50), None);
            assert_eq!(clock.beats(1), None);
        }
    }

    #[test]
    fn a_program_of_the_users_may_take_its_time() {
        let mut clock = Clock::new(|config| config.exec = Some("sleep".into()));
        clock.boot();
        assert_eq!(clock.watch.phase(), Phase::Work);
        clock.say(&end("access"));
        clock.say(&end("release"));
        assert_eq!(clock.watch.phase(), Phase::Free);
        assert_eq!(clock.beats(3600), None);
        clock.say(&Message::ExecEnd { status: 0 });
        assert_eq!(clock.beats(31), Some(Alarm::AskStacks));
    }

    #[test]
    fn no_heartbeat_any_more_is_lost_even_if_the_console_talks() {
        let mut clock = Clock::new(|_| {});
        clock.boot();
        assert_eq!(clock.beats(1), None);
        let alarm = (0..70).find_map(|_| {
            clock.watch.console(clock.now);
            clock.silence(1)
        });
        assert!(matches!(alarm, Some(Alarm::Lost(text)) if text.contains("heartbeat")));
    }

    #[test]
    fn a_guest_without_witness_is_lost_in_the_end() {
        let mut clock = Clock::new(|_| {});
        clock.boot();
        let alarm = (0..400).find_map(|_| {
            clock.watch.device(clock.now);
            clock.silence(1)
        });
        assert!(matches!(alarm, Some(Alarm::Lost(text)) if text.contains("no heartbeat")));
    }

    #[test]
    fn a_guest_that_does_not_power_off_is_lost() {
        let mut clock = Clock::new(|_| {});
        clock.boot();
        clock.say(&Message::Done);
        assert_eq!(clock.beats(58), None);
        assert!(matches!(clock.beats(5), Some(Alarm::Lost(text)) if text.contains("power off")));
    }
}
