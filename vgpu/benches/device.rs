// SPDX-License-Identifier: MIT OR Apache-2.0
//! How fast the device is, without a machine around it.
//!
//! `cargo bench -p vgpu --features testing`. Each figure includes what a job costs to hand over, so jobs are large.
#![allow(clippy::expect_used, reason = "a benchmark may fail loudly")]
#![allow(clippy::print_stdout, reason = "a benchmark prints its figures")]
#![allow(missing_docs, reason = "criterion's macros make public items")]

use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use vgpu::gpu::GpuConfig;
use vgpu::oracle::{DeviceEvent, Oracle, OracleConfig};
use vgpu::testing::{Queue, Rig, Space};
use vgpu_spec::command::OP_WRITE_PTES;
use vgpu_spec::handle::{Handle, Kind};
use vgpu_spec::job::*;
use vgpu_spec::pte::{ATOMIC, HUGE, VALID, WRITE};
use vgpu_spec::witness::{self, Record};

const VA: u64 = 0x10_0000_0000;
/// Pages mapped, and accesses a job.
const PAGES: u64 = 1 << 12;
const HUGE_PAGE: u64 = 2 << 20;

fn rig(tlb_entries: Option<usize>) -> Rig {
    Rig::new(GpuConfig { engines: 1, tlb_entries, ..GpuConfig::default() }, 64 << 20)
}

/// Runs `jobs` as one submission; how long until the last is done.
fn time(rig: &Rig, queue: &mut Queue, job: Job, jobs: u64) -> Duration {
    let start = Instant::now();
    let mut last = 0;
    for _ in 0..jobs {
        last = queue.submit(rig, Job { flags: job.flags | FLAG_NO_IRQ, ..job });
        if queue.tail % 8 == 0 {
            assert_eq!(queue.wait(rig, last).status, JOB_OK);
        }
    }
    assert_eq!(queue.wait(rig, last).status, JOB_OK);
    start.elapsed()
}

/// One translation a word: found in the last few, found in the TLB, walked.
fn translation(c: &mut Criterion) {
    let mut group = c.benchmark_group("translation");
    group.throughput(Throughput::Elements(PAGES));
    for (name, limit, stride) in
        [("same page", None, 8), ("TLB hit", None, 4096), ("TLB miss and walk", Some(1), 4096)]
    {
        let rig = rig(limit);
        let mut space = rig.bind();
        let mut queue = space.queue(4);
        let memory = rig.alloc(0x1000);
        // The same frame at many addresses, so that the host's own TLB and caches do not count.
        for page in 0..PAGES {
            let leaf = memory | VALID | WRITE | ATOMIC;
            space.map(VA + (page << 12), leaf);
        }
        let job = Job { op: OP_STRIDED, dst: VA, len: PAGES, operand: [0, stride, 0], ..Job::default() };
        time(&rig, &mut queue, job, 1);
        group.bench_function(name, |b| b.iter_custom(|jobs| time(&rig, &mut queue, job, jobs)));
    }
    group.finish();
}

/// The CPU's tables for `pages` pages from [`VA`] on, all of which lead to `frame`; the oracle is told that `ctx` mirrors them.
fn mirror(rig: &Rig, ctx: Handle, pages: u64, frame: u64) {
    let mut tables = BTreeMap::new();
    let root = rig.alloc(0x1000);
    for page in 0..pages {
        let va = VA + (page << 12);
        let mut table = root;
        for level in (1..4).rev() {
            let at = table + ((va >> (12 + 9 * level)) & 0x1ff) * 8;
            table = *tables.entry(at).or_insert_with(|| {
                let next = rig.alloc(0x1000);
                rig.put(at, next | 0x67);
                next
            });
        }
        rig.put(table + ((va >> 12) & 0x1ff) * 8, frame | 0x8000_0000_0000_0867);
    }
    rig.oracle.attach_memory(Arc::clone(&rig.memory));
    let types = u64::from_le_bytes([28, 29, 30, 26, 27, 25, 0xff, 0xff]);
    for (kind, mm, arg) in [
        (witness::HELLO, 0, [0; 4]),
        (witness::CPU_FORMAT, 0, [4 | 40 << 8 | 5 << 16 | 9 << 24, 0x000f_ffff_ffff_f000, types, u64::MAX]),
        (witness::MM_BEGIN, 1, [2, root, 0, 0]),
        (witness::NOTIFIER_ADDED, 1, [2, 0, 0, 0]),
        (witness::ASSOCIATE, 1, [ctx.0, 0, 0, 0]),
    ] {
        rig.oracle.witness(&Record { kind, mm, arg, ..Record::default() });
    }
}

/// Maps `pages` pages from [`VA`] on to `frame`, a table of leaves at a time.
fn map(rig: &Rig, space: &mut Space<'_>, pages: u64, frame: u64) {
    let leaves = rig.alloc(0x1000);
    for index in 0..512 {
        rig.put(leaves + index * 8, frame | VALID | WRITE | ATOMIC);
    }
    for first in (0..pages).step_by(512) {
        let table = space.table(0, VA + (first << 12));
        let count = (pages - first).min(512);
        rig.ok(OP_WRITE_PTES, space.ctx, [table.0, count << 16, leaves, 0, 0]);
    }
}

/// What of this process's memory is its own, in bytes: not the guest's, which is a shared mapping.
fn own_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("this process's status");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("RssAnon");
    let kilobytes = line.trim().trim_end_matches("kB").trim();
    kilobytes.parse::<u64>().expect("a number") << 10
}

/// The same as a TLB hit, with each page held against the CPU's tables before and after. The difference is what the comparison
/// costs: with each access to another page, as it is at worst, where more pages mean more misses of the host's caches for the device
/// and the comparison alike; and with a thousand pages in use, spread over all, as programs do. Beside, what a page that is mapped and
/// in the TLB takes of the host's memory.
fn comparison(c: &mut Criterion) {
    let mut group = c.benchmark_group("comparison");
    for pages in [1_000_u64, 10_000, 100_000, 1_000_000, 10_000_000] {
        // So many that one go takes seconds: criterion would have hundreds.
        let many = pages >= 1_000_000;
        group.sample_size(if many { 10 } else { 20 });
        group.sampling_mode(if many { SamplingMode::Flat } else { SamplingMode::Auto });
        for with in [false, true] {
            let before = own_memory();
            let table_pages = u32::try_from(pages / 512 + pages / (512 * 512) + 64).expect("few");
            let config = GpuConfig { engines: 1, table_pages: table_pages.max(8192), ..GpuConfig::default() };
            let rig = Rig::new(config, (64 << 20) + (9 * pages).next_multiple_of(4096));
            let mut space = rig.bind();
            let mut queue = space.queue(4);
            let memory = rig.alloc(0x1000);
            map(&rig, &mut space, pages, memory);
            if with {
                mirror(&rig, space.ctx, pages, memory);
            }
            let with = if with { "compared" } else { "alone" };
            let job = Job { op: OP_STRIDED, dst: VA, ..Job::default() };
            let all = Job { len: pages, operand: [0, 4096, 0], ..job };
            time(&rig, &mut queue, all, 1);
            let each = own_memory().saturating_sub(before) as f64 / pages as f64;
            println!("{pages} pages, {with}: {each:.1} bytes of the host's a page");
            for (use_of, job) in [
                ("each in turn", all),
                ("a thousand in use", Job { len: 1_000, operand: [0, pages / 1_000 * 4096, 0], ..job }),
            ] {
                time(&rig, &mut queue, job, 1);
                group.throughput(Throughput::Elements(job.len));
                let name = format!("{pages} pages, {use_of}, {with}");
                group.bench_function(name, |b| b.iter_custom(|jobs| time(&rig, &mut queue, job, jobs)));
            }
            assert!(rig.oracle.violations().is_empty(), "{:?}", rig.oracle.violations());
            assert_eq!(with == "compared", rig.oracle.counters().steps_compared > 0);
        }
    }
    group.finish();
}

/// INVALIDATE commands, 64 a doorbell, with nothing in flight.
fn invalidate(c: &mut Criterion) {
    let rig = rig(None);
    let space = rig.bind();
    let mut group = c.benchmark_group("commands");
    group.throughput(Throughput::Elements(64));
    let batch = [space.invalidate(VA, VA + 0xfff); 64];
    group.bench_function("invalidate", |b| b.iter(|| rig.wait(rig.submit(&batch))));
    group.throughput(Throughput::Elements(1));
    group.bench_function("round trip", |b| b.iter(|| rig.command(batch[0])));
    group.finish();
}

/// 2 MiB leaves against a plain copy of the same memory.
fn bandwidth(c: &mut Criterion) {
    let rig = rig(None);
    let mut space = rig.bind();
    let mut queue = space.queue(4);
    let (from, to) = (rig.alloc(HUGE_PAGE), rig.alloc(HUGE_PAGE));
    space.map(VA, from | VALID | WRITE | HUGE);
    space.map(VA + HUGE_PAGE, to | VALID | WRITE | HUGE);
    for page in 0..512 {
        space.map(2 * VA + (page << 12), (from + (page << 12)) | VALID | WRITE);
        space.map(3 * VA + (page << 12), (to + (page << 12)) | VALID | WRITE);
    }
    let mut group = c.benchmark_group("bandwidth");
    group.throughput(Throughput::Bytes(HUGE_PAGE));
    let snapshot = rig.memory.snapshot();
    let slice = |at| snapshot.slice_up_to(at, HUGE_PAGE, true).expect("the rig's memory");
    let (source, target) = (slice(from), slice(to));
    group.bench_function("memcpy", |b| b.iter(|| black_box(&source).copy_to_volatile_slice(target)));
    let job = |op, dst, src| Job { op, dst, src, len: HUGE_PAGE, operand: [3, 5, 0], ..Job::default() };
    for (name, job) in [
        ("copy, 2 MiB leaves", job(OP_COPY, VA + HUGE_PAGE, VA)),
        ("copy, 4 KiB leaves", job(OP_COPY, 3 * VA, 2 * VA)),
        ("fill, 2 MiB leaves", job(OP_FILL, VA, 0)),
        ("check, 2 MiB leaves", job(OP_CHECK, 0, VA)),
    ] {
        group.bench_function(name, |b| b.iter_custom(|jobs| time(&rig, &mut queue, job, jobs)));
    }
    group.finish();
}

/// What an event costs the thread of the device that tells of it: the oracle puts it into its trace.
fn trace(c: &mut Criterion) {
    let oracle = Oracle::new(OracleConfig::default());
    let ctx = Handle::new(Kind::Context, 3, 70_000);
    // So that it is no context of the driver's own, whose leaves are looked at.
    oracle.witness(&Record { kind: witness::MM_BEGIN, mm: 1, ..Record::default() });
    oracle.event(DeviceEvent::ContextBound { ctx, tag: 1 });
    let mut group = c.benchmark_group("trace");
    group.throughput(Throughput::Elements(1));
    let mut va = VA;
    let mut next = move || {
        va += 0x1000;
        va
    };
    group.bench_function("leaf set", |b| {
        b.iter(|| {
            let va = next();
            oracle.event(DeviceEvent::LeafSet { ctx, va: Some(va), pte: va | VALID | WRITE });
        });
    });
    group.bench_function("invalidate", |b| {
        b.iter(|| {
            let start = next();
            oracle.event(DeviceEvent::Invalidate { ctx, start, last: start | 0xfff });
        });
    });
    group.finish();
    let (events, bytes) = oracle.trace_size();
    println!("trace: {events} events, {:.1} bytes each", bytes as f64 / events as f64);
}

criterion_group!(benches, translation, comparison, invalidate, bandwidth, trace);
criterion_main!(benches);
