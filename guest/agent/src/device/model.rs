// SPDX-License-Identifier: MIT OR Apache-2.0
//! A device in software, for tests of the workloads themselves: it has no page tables, so it is always right.
//!
//! Jobs run on a thread for each queue and reach memory through process_vm_readv and _writev on this very thread, which
//! answer with an error where an access would be a signal.
#![allow(unsafe_code)] // the atomic job needs the CPU's own atomics, by address

use std::collections::{HashMap, HashSet};
use std::io::{IoSlice, IoSliceMut};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::{getpid, gettid};
use vgpu_spec::job::{
    FLAG_WRITE, JOB_BAD, JOB_FAULT, JOB_KILLED, JOB_OK, OP_ATOMIC_ADD, OP_CHECK, OP_COMPARE, OP_COPY,
    OP_FILL, OP_RANDOM, OP_STRIDED, random_index,
};
use vgpu_spec::uapi::{Act, Layer, Query, RESULTS, Submit, Wait};

use super::{Device, DeviceFile};
use crate::memory::{HUGE, PAGE, Pattern, peek};

static HANDLES: AtomicU64 = AtomicU64::new(1);

/// The device. `corrupt` makes it write a wrong word now and then, to see that the workloads find it.
#[derive(Debug, Default)]
pub(crate) struct Model {
    pub(crate) corrupt: bool,
}

impl Device for Model {
    fn open(&self) -> Result<Box<dyn DeviceFile>, Errno> {
        let open = Open {
            owner: AtomicI32::new(0),
            context: AtomicU64::new(0),
            corrupt: self.corrupt,
            queues: Mutex::default(),
            blocks: Mutex::default(),
        };
        Ok(Box::new(File { open: Mutex::new(Some(Arc::new(open))) }))
    }

    fn associate(&self, _: u64) -> Result<(), Errno> {
        Ok(())
    }
    fn declare(&self, range: &vgpu_spec::uapi::Stable, _: bool) -> Result<(), Errno> {
        if range.start > range.last { Err(Errno::EINVAL) } else { Ok(()) }
    }
}

/// A descriptor.
struct File {
    open: Mutex<Option<Arc<Open>>>,
}

/// An open file.
struct Open {
    /// The process it is bound to; 0: none. Looked at before any lock, since a lock may have been held at a fork.
    owner: AtomicI32,
    context: AtomicU64,
    corrupt: bool,
    queues: Mutex<Vec<Arc<Queue>>>,
    /// Blocks of 2 MiB that jobs have touched: it "maps" each by one leaf.
    blocks: Mutex<HashSet<u64>>,
}

struct Queue {
    jobs: Mutex<Option<mpsc::Sender<Submit>>>,
    next: AtomicU64,
    results: Mutex<HashMap<u64, Wait>>,
    answered: Condvar,
    stopped: AtomicBool,
}

fn this() -> i32 {
    getpid().as_raw()
}

impl Open {
    fn queue(&self, index: u32) -> Result<Arc<Queue>, Errno> {
        match self.owner.load(Ordering::SeqCst) {
            0 => Err(Errno::ENXIO),
            pid if pid != this() => Err(Errno::EPERM),
            _ => self.queues.lock().unwrap().get(index as usize).cloned().ok_or(Errno::EINVAL),
        }
    }

    fn unbind(&self) -> Result<(), Errno> {
        if self.owner.load(Ordering::SeqCst) != this() {
            return Err(Errno::ENXIO);
        }
        self.owner.store(0, Ordering::SeqCst);
        for queue in self.queues.lock().unwrap().drain(..) {
            queue.stopped.store(true, Ordering::SeqCst);
            *queue.jobs.lock().unwrap() = None;
        }
        Ok(())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let _ = self.unbind();
    }
}

impl File {
    fn open(&self) -> Result<Arc<Open>, Errno> {
        self.open.lock().unwrap().clone().ok_or(Errno::EBADF)
    }
}

impl DeviceFile for File {
    fn bind(&self) -> Result<u64, Errno> {
        let open = self.open()?;
        if open.owner.load(Ordering::SeqCst) != 0 {
            return Err(Errno::EBUSY);
        }
        let corrupt = open.corrupt;
        *open.queues.lock().unwrap() = (0..2).map(|_| Queue::start(corrupt)).collect();
        open.owner.store(this(), Ordering::SeqCst);
        open.context.store(HANDLES.fetch_add(1, Ordering::SeqCst), Ordering::SeqCst);
        Ok(open.context.load(Ordering::SeqCst))
    }

    fn submit(&self, job: &Submit) -> Result<u64, Errno> {
        let open = self.open()?;
        let queue = open.queue(job.queue)?;
        if job.op <= OP_COMPARE {
            let block = HUGE as u64;
            open.blocks
                .lock()
                .unwrap()
                .extend(job.dst.max(job.src) / block..(job.dst.max(job.src) + job.len).div_ceil(block));
        }
        let jobs = queue.jobs.lock().unwrap();
        let fence = queue.next.fetch_add(1, Ordering::SeqCst) + 1;
        let sender = jobs.as_ref().ok_or(Errno::ESRCH)?;
        sender.send(Submit { fence, ..*job }).map_err(|_| Errno::ESRCH)?;
        Ok(fence)
    }

    fn wait(&self, queue: u32, fence: u64, timeout: Duration) -> Result<Wait, Errno> {
        let queue = self.open()?.queue(queue)?;
        let until = Instant::now() + timeout;
        let mut results = queue.results.lock().unwrap();
        loop {
            if let Some(wait) = results.get(&fence) {
                return Ok(*wait);
            }
            if results.keys().any(|newer| newer.saturating_sub(RESULTS) >= fence) {
                return Err(Errno::ENODATA);
            }
            if Instant::now() >= until {
                return Err(Errno::ETIME);
            }
            results = queue.answered.wait_timeout(results, Duration::from_millis(50)).unwrap().0;
        }
    }

    fn migrate(&self, _: u64, _: u64, _: bool) -> Result<u64, Errno> {
        Err(Errno::EOPNOTSUPP)
    }

    fn query(&self) -> Result<Query, Errno> {
        let open = self.open()?;
        let state = match open.owner.load(Ordering::SeqCst) {
            0 => 0,
            pid if pid == this() => 1,
            _ => 2,
        };
        let huge_maps = open.blocks.lock().unwrap().len() as u64;
        Ok(Query {
            state,
            ctx: open.context.load(Ordering::SeqCst),
            queues: 2,
            huge_maps,
            ..Query::default()
        })
    }

    fn unbind(&self) -> Result<(), Errno> {
        self.open()?.unbind()
    }

    fn layer(&self) -> Result<Layer, Errno> {
        self.open().map(|_| Layer::default())
    }

    fn act(&self, _: &Act) -> Result<(), Errno> {
        self.open().and(Err(Errno::ENOTTY))
    }

    fn duplicate(&self) -> Result<Box<dyn DeviceFile>, Errno> {
        Ok(Box::new(Self { open: Mutex::new(Some(self.open()?)) }))
    }

    fn keep_across_exec(&self, _: bool) -> Result<(), Errno> {
        self.open().map(drop)
    }

    fn close(&self) {
        self.open.lock().unwrap().take();
    }
}

impl Queue {
    fn start(corrupt: bool) -> Arc<Self> {
        let (sender, jobs) = mpsc::channel();
        let queue = Arc::new(Self {
            jobs: Mutex::new(Some(sender)),
            next: AtomicU64::new(0),
            results: Mutex::default(),
            answered: Condvar::new(),
            stopped: AtomicBool::new(false),
        });
        let own = queue.clone();
        std::thread::spawn(move || {
            for job in jobs {
                let wait = own.run(&job, corrupt);
                let mut results = own.results.lock().unwrap();
                results.insert(job.fence, wait);
                results.retain(|fence, _| fence + RESULTS > job.fence);
                drop(results);
                own.answered.notify_all();
            }
        });
        queue
    }

    fn run(&self, job: &Submit, corrupt: bool) -> Wait {
        let mut result = Results::default();
        let pattern = Pattern { first: job.operand[0], step: job.operand[1] };
        let address = |i: u64| match job.op {
            OP_RANDOM => job.dst + 8 * random_index(job.operand[0], i, job.operand[1] / 8),
            _ => job.dst + i * job.operand[1],
        };
        let write = job.flags & FLAG_WRITE != 0;
        let ended = if (job.dst | job.src) % 8 != 0 || job.op <= OP_COMPARE && job.len % 8 != 0 {
            Err((JOB_BAD, 0))
        } else if job.op <= OP_COMPARE {
            self.each_page(job, |at, bytes| match job.op {
                OP_FILL => {
                    let mut words = pattern_bytes(pattern.from(at), bytes);
                    if corrupt && at == 0 {
                        words[3] ^= 1;
                    }
                    write_to(job.dst + at as u64, &words)
                }
                OP_COPY => write_to(job.dst + at as u64, &read_from(job.src + at as u64, bytes)?),
                OP_CHECK => {
                    let found = read_from(job.src + at as u64, bytes)?;
                    result.compare(job.src + at as u64, &found, &pattern_bytes(pattern.from(at), bytes));
                    Ok(())
                }
                _ => {
                    let found = read_from(job.src + at as u64, bytes)?;
                    result.compare(job.src + at as u64, &found, &read_from(job.dst + at as u64, bytes)?);
                    Ok(())
                }
            })
        } else {
            (0..job.len).try_for_each(|i| {
                if i % 64 == 0 && self.stopped.load(Ordering::Relaxed) {
                    return Err((JOB_KILLED, 0));
                }
                let va = address(i);
                let old = peek(va).ok_or((JOB_FAULT, va));
                match job.op {
                    OP_ATOMIC_ADD => {
                        old?;
                        // SAFETY: the word was readable a moment ago, and no workload changes memory under an atomic job.
                        let word = unsafe { AtomicU64::from_ptr(va as *mut u64) };
                        result.add(word.fetch_add(job.operand[0], Ordering::SeqCst));
                        Ok(())
                    }
                    OP_STRIDED if write => write_to(va, &job.operand[0].wrapping_add(i).to_ne_bytes()),
                    OP_RANDOM if write => {
                        let word = old? ^ job.operand[2] ^ ((va - job.dst) / 8);
                        write_to(va, &word.to_ne_bytes())
                    }
                    _ => {
                        result.add(old?);
                        Ok(())
                    }
                }
            })
        };
        let (status, address) = match ended {
            Ok(()) => (JOB_OK, result.first),
            Err(ended) => ended,
        };
        Wait { status, result: result.value, address, ..Wait::default() }
    }

    /// Goes over a job in parts that cross no page border of source or destination.
    fn each_page(
        &self,
        job: &Submit,
        mut part: impl FnMut(usize, usize) -> Result<(), Ended>,
    ) -> Result<(), Ended> {
        let mut at = 0;
        while at < job.len {
            if self.stopped.load(Ordering::Relaxed) {
                return Err((JOB_KILLED, 0));
            }
            let to_end = |address: u64| PAGE as u64 - (address + at) % PAGE as u64;
            let bytes = to_end(job.dst).min(to_end(job.src)).min(job.len - at);
            part(at as usize, bytes as usize)?;
            at += bytes;
        }
        Ok(())
    }
}

/// Status and address of a job that ended early.
type Ended = (u32, u64);

#[derive(Default)]
struct Results {
    value: u64,
    first: u64,
}

impl Results {
    fn add(&mut self, word: u64) {
        self.value = self.value.wrapping_add(word);
    }

    fn compare(&mut self, start: u64, found: &[u8], expected: &[u8]) {
        for (index, (found, expected)) in found.chunks(8).zip(expected.chunks(8)).enumerate() {
            if found != expected {
                if self.value == 0 {
                    self.first = start + 8 * index as u64;
                }
                self.value += 1;
            }
        }
    }
}

fn pattern_bytes(pattern: Pattern, bytes: usize) -> Vec<u8> {
    (0..bytes).step_by(8).flat_map(|at| pattern.word(at).to_ne_bytes()).collect()
}

fn read_from(address: u64, bytes: usize) -> Result<Vec<u8>, Ended> {
    let mut data = vec![0; bytes];
    let remote = RemoteIoVec { base: address as usize, len: bytes };
    match process_vm_readv(gettid(), &mut [IoSliceMut::new(&mut data)], &[remote]) {
        Ok(read) if read == bytes => Ok(data),
        _ => Err((JOB_FAULT, address)),
    }
}

fn write_to(address: u64, data: &[u8]) -> Result<(), Ended> {
    let remote = RemoteIoVec { base: address as usize, len: data.len() };
    match process_vm_writev(gettid(), &[IoSlice::new(data)], &[remote]) {
        Ok(written) if written == data.len() => Ok(()),
        _ => Err((JOB_FAULT, address)),
    }
}
