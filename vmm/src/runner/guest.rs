// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where the witness's function and the oracle hand over what they get, on the machine's threads.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel};
use std::sync::{Arc, OnceLock, Weak};

use guest_protocol::{Case, Message, Wish};
use parking_lot::Mutex;
use vgpu::gpu::Gpu;
use vgpu::oracle::{Oracle, Rule, Violation};
use vgpu::witness::GuestSink;
use vgpu_spec::witness::Record;

use super::pace::Pace;
use super::session::Input;
use crate::gates::engine::Engine;

/// Takes what the guest says and puts it into the session's queue.
///
/// A full queue makes the guest wait: it is emptied by a thread that never waits for the guest.
#[derive(Debug)]
pub struct GuestLine {
    queue: SyncSender<Input>,
    workload: Mutex<Option<String>>,
    hello: AtomicBool,
    heartbeats: AtomicU64,
    missed: AtomicU64,
    pace: Pace,
    engine: OnceLock<Arc<Engine>>,
    gpu: OnceLock<Weak<Gpu>>,
}

impl GuestLine {
    /// A line into `queue`.
    #[must_use]
    pub fn new(queue: SyncSender<Input>) -> Arc<Self> {
        Arc::new(Self {
            queue,
            workload: Mutex::new(None),
            hello: AtomicBool::new(false),
            heartbeats: AtomicU64::new(0),
            missed: AtomicU64::new(0),
            pace: Pace::default(),
            engine: OnceLock::new(),
            gpu: OnceLock::new(),
        })
    }
    /// Who follows the scenario, to be told what is found while the guest stands still.
    pub fn follows(&self, engine: Arc<Engine>) {
        // The first one stays.
        let _ = self.engine.set(engine);
    }
    /// Whom wishes are for that the guest waits for.
    pub fn serves(&self, gpu: Weak<Gpu>) {
        // The first one stays.
        let _ = self.gpu.set(gpu);
    }
    fn found(&self, what: &str) {
        if let Some(engine) = self.engine.get() {
            engine.found(what);
        }
    }
    /// The witness has said hello.
    #[must_use]
    pub fn hello_seen(&self) -> bool {
        self.hello.load(Ordering::SeqCst)
    }
    /// Heartbeats so far.
    #[must_use]
    pub fn heartbeats(&self) -> u64 {
        self.heartbeats.load(Ordering::SeqCst)
    }
    /// What its heartbeats are worth.
    #[must_use]
    pub fn pace(&self) -> &Pace {
        &self.pace
    }
    /// Probes the witness has missed so far.
    #[must_use]
    pub fn missed(&self) -> u64 {
        self.missed.load(Ordering::SeqCst)
    }
}

impl GuestSink for GuestLine {
    fn message(&self, json: &[u8]) {
        let input = match serde_json::from_slice::<Message>(json) {
            Ok(message) => {
                // Kept here too, because violations are found on this very thread before the queue is read.
                match &message {
                    Message::WorkloadStart { workload, .. } => *self.workload.lock() = Some(workload.clone()),
                    Message::WorkloadEnd { .. } => *self.workload.lock() = None,
                    &Message::Ask { wish: Wish::FailCopies { count } } => {
                        if let Some(gpu) = self.gpu.get().and_then(Weak::upgrade) {
                            gpu.fail_copies(count);
                        }
                    }
                    Message::Case(Case { mismatch: Some(_), .. }) => self.found(Rule::DataMismatch.name()),
                    _ => {}
                }
                Input::Message(Box::new(message))
            }
            Err(error) => {
                let start: String = String::from_utf8_lossy(&json[..json.len().min(120)]).into_owned();
                Input::Garbled(format!("{error}: {start}"))
            }
        };
        // The session has ended: nobody wants it.
        let _ = self.queue.send(input);
    }
    fn heartbeat(&self, count: u64, missed: u64) -> bool {
        self.heartbeats.fetch_max(count, Ordering::SeqCst);
        // What was missed must be known before anybody is accused for it.
        let news = self.missed.fetch_max(missed, Ordering::SeqCst) < missed;
        let counts = self.pace.beat() || news;
        // If the queue is full there is enough life in it.
        let _ = self.queue.try_send(Input::Heartbeat { counts });
        counts
    }
    fn hello(&self, _record: &Record) {
        self.hello.store(true, Ordering::SeqCst);
    }
}

/// Remembers in which workload each violation was found.
#[derive(Debug, Default)]
pub struct Finds {
    finds: Mutex<Vec<(Violation, Option<String>)>>,
}

impl Finds {
    /// Follows `oracle`; the violations come out of the receiver with what `complete` knows of them and their workload.
    ///
    /// The oracle's list is bounded, and so is what is kept here.
    pub fn follow(
        oracle: &Oracle,
        line: Arc<GuestLine>,
        complete: impl Fn(&mut Violation, Option<&str>) + Send + Sync + 'static,
    ) -> (Arc<Self>, Receiver<Violation>) {
        let finds = Arc::new(Self::default());
        let (sender, receiver): (Sender<Violation>, _) = channel();
        let kept = Arc::clone(&finds);
        oracle.on_violation(Box::new(move |violation| {
            let workload = line.workload.lock().clone();
            line.found(violation.rule.name());
            let mut violation = violation.clone();
            complete(&mut violation, workload.as_deref());
            kept.finds.lock().push((violation.clone(), workload));
            let _ = sender.send(violation);
        }));
        (finds, receiver)
    }

    /// The workload in which `violation` was found.
    #[must_use]
    pub fn workload(&self, violation: &Violation) -> Option<String> {
        let same = |found: &&(Violation, Option<String>)| {
            let found = &found.0;
            (found.rule, found.context, found.address, found.frame)
                == (violation.rule, violation.context, violation.address, violation.frame)
                && found.summary == violation.summary
        };
        let finds = self.finds.lock();
        finds.iter().find(same).and_then(|(_, workload)| workload.clone())
    }
}
