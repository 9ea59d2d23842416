// SPDX-License-Identifier: MIT OR Apache-2.0
//! A bound context and jobs on it, with the checks that every workload needs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use vgpu_spec::job;
use vgpu_spec::uapi::{self, Submit, Wait};

use crate::device::{Device, DeviceFile};
use crate::memory::{Mapping, PAGE, Pattern, peek};
use crate::outcome::{Checked, Doing, Failure, describe, require};
use crate::process::{BOUND, Pause};

/// A job to be queued.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job(Submit);

impl Job {
    fn new(op: u16, dst: u64, src: u64, len: u64, operand: [u64; 3]) -> Self {
        Self(Submit { op, dst, src, len, operand, ..Submit::default() })
    }

    /// Writes a pattern.
    pub(crate) fn fill(dst: u64, bytes: usize, pattern: Pattern) -> Self {
        Self::new(job::OP_FILL, dst, 0, bytes as u64, [pattern.first, pattern.step, 0])
    }

    /// Compares with a pattern.
    pub(crate) fn check(src: u64, bytes: usize, pattern: Pattern) -> Self {
        Self::new(job::OP_CHECK, 0, src, bytes as u64, [pattern.first, pattern.step, 0])
    }

    /// Copies.
    pub(crate) fn copy(dst: u64, src: u64, bytes: usize) -> Self {
        Self::new(job::OP_COPY, dst, src, bytes as u64, [0; 3])
    }

    /// Compares two ranges.
    pub(crate) fn compare(dst: u64, src: u64, bytes: usize) -> Self {
        Self::new(job::OP_COMPARE, dst, src, bytes as u64, [0; 3])
    }

    /// Adds `amount` to `count` words, `stride` bytes apart.
    pub(crate) fn atomic_add(dst: u64, count: u64, stride: usize, amount: u64) -> Self {
        Self::new(job::OP_ATOMIC_ADD, dst, 0, count, [amount, stride as u64, 0])
    }

    /// Reads `count` words, `stride` bytes apart.
    pub(crate) fn strided_read(dst: u64, count: u64, stride: usize) -> Self {
        Self::new(job::OP_STRIDED, dst, 0, count, [0, stride as u64, 0])
    }

    /// Writes `first`, `first + 1`, … to `count` words, `stride` bytes apart.
    pub(crate) fn strided_write(dst: u64, count: u64, stride: usize, first: u64) -> Self {
        Self::new(job::OP_STRIDED, dst, 0, count, [first, stride as u64, 0]).flags(job::FLAG_WRITE)
    }

    /// Reads `count` words of a range in random order.
    pub(crate) fn random_read(dst: u64, bytes: usize, count: u64, seed: u64) -> Self {
        Self::new(job::OP_RANDOM, dst, 0, count, [seed, bytes as u64, 0])
    }

    /// Xors `count` words of a range in random order.
    pub(crate) fn random_write(dst: u64, bytes: usize, count: u64, seed: u64, xor: u64) -> Self {
        Self::new(job::OP_RANDOM, dst, 0, count, [seed, bytes as u64, xor]).flags(job::FLAG_WRITE)
    }

    /// Adds flags.
    pub(crate) fn flags(mut self, flags: u16) -> Self {
        self.0.flags |= flags;
        self
    }

    /// As the driver takes it.
    pub(crate) fn raw(self) -> Submit {
        self.0
    }

    /// Puts it on another queue than 0.
    pub(crate) fn queue(mut self, queue: u32) -> Self {
        self.0.queue = queue;
        self
    }
}

/// A job that is queued.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ticket {
    queue: u32,
    fence: u64,
}

/// How a job ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Done {
    /// Handle of the context it ran on.
    context: u64,
    /// A `JOB_` constant.
    pub(crate) status: u32,
    /// By job.
    pub(crate) result: u64,
    /// By job and status.
    pub(crate) address: u64,
}

impl Done {
    fn of(context: u64, wait: &Wait) -> Self {
        Self { context, status: wait.status, result: wait.result, address: wait.address }
    }

    /// It must have been carried out. A fault that ended it is one on memory that is there.
    pub(crate) fn ok(self) -> Checked<Self> {
        if self.status == job::JOB_FAULT {
            return Err(Failure::refused(self.context, self.address, format!("the job ended with {self}")));
        }
        require(self.status == job::JOB_OK, || format!("the job ended with {self}"))?;
        Ok(self)
    }

    /// It was carried out, or met memory that is not there: both are right while memory is taken away.
    pub(crate) fn ok_or_fault(self) -> Checked<Self> {
        require(matches!(self.status, job::JOB_OK | job::JOB_FAULT), || {
            format!("the job ended with {self}")
        })?;
        Ok(self)
    }

    /// Whether it faulted in the page at `address`.
    pub(crate) fn has_faulted_at(self, address: u64) -> bool {
        let page = !(PAGE as u64 - 1);
        self.status == job::JOB_FAULT && self.address & page == address & page
    }

    /// It must have faulted in the page at `address`. That it was carried out instead is data the device must not have
    /// reached, and is reported as such.
    pub(crate) fn faulted_at(self, address: u64) -> Checked {
        if self.status == job::JOB_OK {
            return Err(Failure::reached(
                self.context,
                address,
                format!("the job should have faulted but ended with {self}"),
            ));
        }
        require(self.has_faulted_at(address), || {
            format!("the job should have faulted at {address:#x} but ended with {self}")
        })
    }
}

impl std::fmt::Display for Done {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let status = match self.status {
            job::JOB_OK => "ok",
            job::JOB_FAULT => "fault",
            job::JOB_KILLED => "killed",
            job::JOB_BAD => "bad job",
            job::JOB_BUS_ERROR => "bus error",
            _ => "an unknown status",
        };
        write!(out, "{status} ({}), result {:#x}, address {:#x}", self.status, self.result, self.address)
    }
}

/// A file of the driver that is bound to this address space. Closed when dropped.
pub(crate) struct Context {
    file: Box<dyn DeviceFile>,
    handle: u64,
    /// The newest fence of each queue, whichever descriptor it was given to.
    newest: Arc<[AtomicU64; uapi::QUEUES as usize]>,
}

impl Context {
    /// Opens, binds, and tells the witness.
    pub(crate) fn bind(device: &dyn Device) -> Checked<Self> {
        Self::bind_on(device, device.open().doing("open")?)
    }

    /// Binds a file that is open, which another process may have opened, and tells the witness.
    pub(crate) fn bind_on(device: &dyn Device, file: Box<dyn DeviceFile>) -> Checked<Self> {
        let context = Self::on(file)?;
        context.claim(device)?;
        Ok(context)
    }

    /// Opens and binds, and tells the witness; `None` if the device has no context left.
    pub(crate) fn bind_if_any(device: &dyn Device) -> Checked<Option<Self>> {
        let file = device.open().doing("open")?;
        let handle = match file.bind() {
            Err(Errno::ENOSPC) => return Ok(None),
            other => other.doing("bind")?,
        };
        let context = Self { file, handle, newest: Arc::default() };
        context.claim(device)?;
        Ok(Some(context))
    }

    /// Tells the witness whose it is.
    fn claim(&self, device: &dyn Device) -> Checked {
        match device.associate(self.handle) {
            Err(Errno::ESRCH) => self.mirror(device),
            other => other.doing("associate"),
        }
    }

    /// Binds a file that is open already, perhaps by another process. The witness is told by [`Context::associate`], which may
    /// have to come after the first access.
    pub(crate) fn on(file: Box<dyn DeviceFile>) -> Checked<Self> {
        let until = Instant::now() + BOUND;
        let mut pause = Pause::default();
        let handle = loop {
            match file.bind() {
                // Files of processes that have just ended are closed a little later, so the contexts come back a little later; and
                // some case may have all of them for a moment.
                Err(Errno::ENOSPC) if Instant::now() < until => pause.take(),
                Err(Errno::EINTR) => {}
                other => break other.doing("bind")?,
            }
        };
        Ok(Self { file, handle, newest: Arc::default() })
    }

    /// Tells the witness whose address space this context mirrors: the caller's.
    pub(crate) fn associate(&self, device: &dyn Device) -> Checked {
        device.associate(self.handle).doing("associate")
    }

    /// A driver may insert its notifier as late as at the first fault: has the device read a word, and tells the witness then.
    fn mirror(&self, device: &dyn Device) -> Checked {
        let map = Mapping::small(PAGE).doing("mmap")?;
        map.touch(0, PAGE);
        self.run(Job::strided_read(map.at(0), 1, 8))?.ok().doing("first access")?;
        match device.associate(self.handle) {
            Err(Errno::ESRCH) => Err(Failure::reached(
                self.handle,
                map.at(0),
                "the device has read the memory of an address space without a notifier".to_owned(),
            )),
            other => other.doing("associate"),
        }
    }

    /// The context's handle.
    pub(crate) fn handle(&self) -> u64 {
        self.handle
    }

    /// Its file.
    pub(crate) fn file(&self) -> &dyn DeviceFile {
        &*self.file
    }

    /// Queues a job, if need be when there is a place for it.
    pub(crate) fn submit(&self, job: Job) -> Checked<Ticket> {
        let until = Instant::now() + BOUND;
        let mut pause = Pause::default();
        loop {
            match self.try_submit(job)? {
                Some(ticket) => return Ok(ticket),
                None if Instant::now() < until => pause.take(),
                None => return Err(self.refusal(Errno::EAGAIN)).doing("submit"),
            }
        }
    }

    /// Queues a job; `None` if the queue is full (or a signal came in between).
    pub(crate) fn try_submit(&self, job: Job) -> Checked<Option<Ticket>> {
        match self.file.submit(&job.0) {
            Ok(fence) => {
                if let Some(newest) = self.newest.get(job.0.queue as usize) {
                    newest.fetch_max(fence, Ordering::Relaxed);
                }
                Ok(Some(Ticket { queue: job.0.queue, fence }))
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
            Err(errno) => Err(self.refusal(errno)).doing("submit"),
        }
    }

    /// Whether a job is taken at all; for those that must not be.
    pub(crate) fn accepts(&self, job: Job) -> bool {
        !matches!(self.file.submit(&job.0), Err(errno) if errno != Errno::EAGAIN)
    }

    /// The same context through another descriptor.
    pub(crate) fn duplicate(&self) -> Checked<Self> {
        let newest = Arc::clone(&self.newest);
        Ok(Self { file: self.file.duplicate().doing("dup")?, handle: self.handle, newest })
    }

    /// Waits for a job, in bounded time.
    pub(crate) fn wait(&self, ticket: Ticket) -> Checked<Done> {
        let until = Instant::now() + BOUND;
        loop {
            let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            match self.file.wait(ticket.queue, ticket.fence, left) {
                // A driver that looks once more when the time is up would pass for one that had been told.
                Ok(_) if Instant::now() >= until => {
                    return Err(Failure::wrong(format!(
                        "wait: the job's end was noticed after {BOUND:?}, when the wait ended"
                    )));
                }
                Ok(wait) => {
                    return Ok(Done::of(self.handle, &wait));
                }
                Err(Errno::EINTR) if Instant::now() < until => {}
                Err(errno) => return Err(self.no_result(ticket, errno)).doing("wait"),
            }
        }
    }

    /// Whether a job has ended by now. So has one whose result is forgotten because enough newer ones were submitted.
    pub(crate) fn has_ended(&self, ticket: Ticket) -> Checked<bool> {
        match self.file.wait(ticket.queue, ticket.fence, Duration::ZERO) {
            Ok(_) => Ok(true),
            Err(Errno::ETIME | Errno::EINTR) => Ok(false),
            Err(Errno::ENODATA) if self.newer(ticket) >= uapi::RESULTS => Ok(true),
            Err(errno) => Err(self.no_result(ticket, errno)).doing("wait"),
        }
    }

    /// What it means that this context, which nobody has ended, refuses something.
    ///
    /// That the caller's address space lives is certain: it is the caller's. The driver is asked once more, so that a device
    /// that has been taken away is not mistaken for it.
    pub(crate) fn refusal(&self, errno: Errno) -> Failure {
        let gone = matches!(errno, Errno::ENXIO | Errno::ESRCH)
            && matches!(self.file.query(), Ok(query) if query.state != uapi::STATE_BOUND);
        if gone {
            let detail = format!("the context that this process has bound is gone: {}", describe(errno));
            Failure::ended(self.handle, detail)
        } else {
            Failure::wrong(describe(errno))
        }
    }

    /// How many jobs were submitted to its queue after a job.
    fn newer(&self, ticket: Ticket) -> u64 {
        let newest =
            self.newest.get(ticket.queue as usize).map_or(u64::MAX, |one| one.load(Ordering::Relaxed));
        newest.saturating_sub(ticket.fence)
    }

    /// The same of a job that has been waited for, about which nothing is known.
    fn no_result(&self, ticket: Ticket, errno: Errno) -> Failure {
        let newer = self.newer(ticket);
        if errno == Errno::ENODATA && newer < uapi::RESULTS {
            let detail = format!(
                "of job {} nothing is known, though only {newer} newer ones were submitted: {}",
                ticket.fence,
                describe(errno)
            );
            return Failure::ended(self.handle, detail);
        }
        self.refusal(errno)
    }

    /// Waits for a job, and does something every few milliseconds meanwhile, such as serving what it waits for.
    pub(crate) fn wait_and(&self, ticket: Ticket, mut meanwhile: impl FnMut() -> Checked) -> Checked<Done> {
        let until = Instant::now() + BOUND;
        loop {
            match self.file.wait(ticket.queue, ticket.fence, Duration::from_millis(5)) {
                Err(Errno::ETIME | Errno::EINTR) if Instant::now() < until => meanwhile()?,
                other => {
                    let wait = other.map_err(|errno| self.no_result(ticket, errno)).doing("wait")?;
                    return Ok(Done::of(self.handle, &wait));
                }
            }
        }
    }

    /// Runs a job to its end.
    pub(crate) fn run(&self, job: Job) -> Checked<Done> {
        self.wait(self.submit(job)?)
    }

    /// The device writes a pattern.
    pub(crate) fn fill(&self, map: &Mapping, offset: usize, bytes: usize, pattern: Pattern) -> Checked {
        self.run(Job::fill(map.at(offset), bytes, pattern))?.ok().doing("device fill").map(drop)
    }

    /// The device must find a pattern.
    pub(crate) fn check(&self, map: &Mapping, offset: usize, bytes: usize, pattern: Pattern) -> Checked {
        self.check_on(0, map, offset, bytes, pattern)
    }

    /// The same, on another queue than 0.
    pub(crate) fn check_on(
        &self,
        queue: u32,
        map: &Mapping,
        offset: usize,
        bytes: usize,
        pattern: Pattern,
    ) -> Checked {
        let done = self.run(Job::check(map.at(offset), bytes, pattern).queue(queue))?;
        self.checked(done, map.at(offset), pattern)
    }

    /// A check that has ended must have found the pattern, which begins at `start`.
    pub(crate) fn checked(&self, done: Done, start: u64, pattern: Pattern) -> Checked {
        let done = done.ok().doing("device check")?;
        if done.result == 0 {
            return Ok(());
        }
        let expected = pattern.word(done.address.wrapping_sub(start) as usize);
        // What the device saw is gone; what is there now is the best that can be said.
        let found = peek(done.address).unwrap_or_default();
        let failure = Failure::device(self.handle, done.address, expected, found);
        Err(failure.at(&format!("device check: {} words differ (found is a second reading)", done.result)))
    }

    /// The CPU must find a pattern.
    pub(crate) fn cpu_check(&self, map: &Mapping, offset: usize, bytes: usize, pattern: Pattern) -> Checked {
        match map.differs(offset, bytes, pattern) {
            None => Ok(()),
            Some((at, found)) => Err(Failure::cpu(self.handle, map.at(at), pattern.word(at - offset), found)),
        }
    }

    /// Reading and writing at `offset` must both fault.
    pub(crate) fn must_not_reach(&self, map: &Mapping, offset: usize) -> Checked {
        self.must_not_read(map, offset)?;
        self.must_not_write(map, offset)
    }

    /// Reading at `offset` must fault.
    pub(crate) fn must_not_read(&self, map: &Mapping, offset: usize) -> Checked {
        self.run(Job::check(map.at(offset), 8, Pattern::ZERO))?
            .faulted_at(map.at(offset))
            .doing("device read")
    }

    /// Writing at `offset` must fault.
    pub(crate) fn must_not_write(&self, map: &Mapping, offset: usize) -> Checked {
        let pattern = Pattern { first: 0xbad, step: 0 };
        self.run(Job::fill(map.at(offset), 8, pattern))?.faulted_at(map.at(offset)).doing("device write")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

    use super::*;
    use crate::device::model::Model;

    /// Its address space has a notifier only after it has been asked for so many times.
    struct Late(Model, AtomicU32);
    impl Device for Late {
        fn open(&self) -> Result<Box<dyn DeviceFile>, Errno> {
            self.0.open()
        }
        fn associate(&self, _: u64) -> Result<(), Errno> {
            let left = self.1.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1));
            if left.is_ok() { Err(Errno::ESRCH) } else { Ok(()) }
        }
        fn declare(&self, range: &uapi::Stable, on: bool) -> Result<(), Errno> {
            self.0.declare(range, on)
        }
    }

    fn ended(failure: &Failure) -> bool {
        matches!(failure, Failure::Mismatch(mismatch, _) if mismatch.reader == guest_protocol::Reader::Ended)
    }

    #[test]
    fn a_context_that_is_gone_is_told_from_a_device_that_is() {
        let device = Model::default();
        let context = Context::bind(&device).unwrap();
        let map = Mapping::small(PAGE).unwrap();
        let job = Job::strided_write(map.at(0), 1, 8, 1);
        context.run(job).unwrap();
        context.file().unbind().unwrap();
        assert!(ended(&context.run(job).unwrap_err()));
        // A descriptor that is closed says nothing of the context.
        context.file().close();
        assert!(!ended(&context.run(job).unwrap_err()));
    }

    #[test]
    fn of_the_newest_jobs_something_is_known() {
        let device = Model::default();
        let context = Context::bind(&device).unwrap();
        let ticket = Ticket { queue: 0, fence: 7 };
        for (newest, errno, gone) in [
            (7, Errno::ENODATA, true),
            (6 + uapi::RESULTS, Errno::ENODATA, true),
            (7 + uapi::RESULTS, Errno::ENODATA, false),
            (7, Errno::ETIME, false),
            (7, Errno::ENXIO, false), // it is bound
        ] {
            context.newest[0].store(newest, SeqCst);
            assert_eq!(ended(&context.no_result(ticket, errno)), gone, "{newest} {errno}");
        }
    }

    #[test]
    fn a_job_whose_result_is_forgotten_has_ended() {
        let device = Model::default();
        let context = Context::bind(&device).unwrap();
        let map = Mapping::small(PAGE).unwrap();
        let job = Job::fill(map.at(0), 8, Pattern { first: 1, step: 0 });
        let first = context.submit(job).unwrap();
        context.wait(first).unwrap();
        assert!(context.has_ended(first).unwrap());
        let mut last = first;
        for _ in 0..uapi::RESULTS {
            last = context.submit(job).unwrap();
        }
        context.wait(last).unwrap();
        assert!(context.wait(first).is_err());
        assert!(context.has_ended(first).unwrap());
    }

    #[test]
    fn a_notifier_may_come_with_the_first_access_and_not_later() {
        for (refusals, fine) in [(0, true), (1, true), (2, false)] {
            let bound = Context::bind(&Late(Model::default(), AtomicU32::new(refusals)));
            match bound {
                Ok(_) => assert!(fine),
                Err(failure) => assert!(!fine && matches!(failure, Failure::Mismatch(..)), "{failure}"),
            }
        }
    }
}
