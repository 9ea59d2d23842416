// SPDX-License-Identifier: MIT OR Apache-2.0
//! An access that is replayed for ever is found, and one that may get on, or could not be helped, is not.

use std::ops::Range;

use vgpu_spec::handle::{Handle, Kind};
use vgpu_spec::range as spec;
use vgpu_spec::witness;

use super::DeviceEvent as E;
use super::livelock::REPLAYS;
use super::oracle_test::{Bench, VA, bench_with, ctx};
use super::range_test::guest;
use super::*;

const QUEUE: u32 = 5;
/// More than the heartbeats in which a fault must be answered.
const LONG: u32 = 101;

fn bench() -> Bench {
    bench_with(OracleConfig::default())
}

impl Bench {
    /// An access of a queue faults, once for each number of times before, and is replayed each time.
    fn replays(&self, queue: u32, ctx: Handle, va: u64, again: Range<u32>) {
        for again in again {
            let fault = Handle::new(Kind::Fault, queue, again + 1);
            self.oracle.event(E::FaultRaised { fault, ctx, va, access: 1, again });
            self.oracle.event(E::FaultReplayed { fault, ctx, va });
        }
    }
    /// The same over and over, with so many heartbeats before the last time.
    fn endless(&self, ctx: Handle, again: Range<u32>, beats: u32) {
        let last = again.end - 1;
        self.replays(QUEUE, ctx, VA, again.start..last);
        self.beat(beats);
        self.replays(QUEUE, ctx, VA, last..last + 1);
    }
}

#[test]
fn an_access_that_is_replayed_for_ever_is_found() {
    let b = bench();
    let c = ctx(1, 2);
    b.bind(c);
    b.endless(c, 0..REPLAYS + 1, LONG);
    let found = b.oracle.violations();
    let [v] = &found[..] else { panic!("{found:#?}") };
    assert_eq!((v.rule, v.context, v.address), (Rule::HangLivelock, Some(c.0), Some(VA)));
    assert_eq!(
        v.summary,
        "an access of context 1#2 at 0x7f0000001000 has faulted 1001 times in a row within 101 heartbeats, and was replayed each time"
    );
    let last = v.events.last().unwrap();
    assert!(last.ends_with("raised at 0x7f0000001000 (read), again after 1000 in a row"), "{last}");
    // Once for the access.
    b.replays(QUEUE, c, VA, REPLAYS + 1..REPLAYS + 9);
    assert_eq!(b.oracle.violations()[0].count, 1);
    // What the watchdog says of the context is another sentence.
    b.oracle.report(Violation::new(Rule::HangLivelock, "no task is blocked").on(c));
    assert_eq!(b.rules(), ["hang/livelock"; 2]);
    // The next access of the queue is stuck as well; a context is accused once, with a count.
    b.endless(c, 0..REPLAYS + 1, LONG);
    assert_eq!(b.rules().len(), 2);
    assert_eq!(b.oracle.violations()[0].count, 2);
}

#[test]
fn it_has_so_many_replays_and_so_many_heartbeats() {
    let c = ctx(1, 1);
    let b = bench();
    b.bind(c);
    b.endless(c, 0..REPLAYS, LONG);
    b.clean();
    b.replays(QUEUE, c, VA, REPLAYS..REPLAYS + 1);
    assert_eq!(b.rules(), ["hang/livelock"]);
    let b = bench();
    b.bind(c);
    b.endless(c, 0..5 * REPLAYS, LONG - 1);
    b.clean();
    b.beat(1);
    b.clean();
    b.replays(QUEUE, c, VA, 5 * REPLAYS..5 * REPLAYS + 1);
    assert_eq!(b.rules(), ["hang/livelock"]);
}

#[test]
fn what_gets_on_in_between_is_no_livelock() {
    let b = bench();
    let c = ctx(1, 1);
    b.bind(c);
    for _ in 0..5 {
        b.endless(c, 0..REPLAYS - 1, LONG);
    }
    b.clean();
}

#[test]
fn another_place_queue_or_context_is_another_access() {
    let b = bench();
    let (c, d) = (ctx(1, 1), ctx(2, 1));
    b.bind(c);
    b.bind(d);
    let last = REPLAYS..REPLAYS + 1;
    b.replays(QUEUE, c, VA, 0..REPLAYS);
    b.beat(LONG);
    b.replays(QUEUE + 1, c, VA, last.clone());
    b.replays(QUEUE, c, VA + 8, last.clone());
    b.replays(QUEUE, d, VA + 8, last.clone());
    b.replays(QUEUE, c, VA, last);
    b.clean();
    // A copy whose two places become possible in turn, and never at once: nobody can say that either was not.
    for again in 0..4 * REPLAYS {
        b.replays(QUEUE, c, VA + u64::from(again % 2) * 0x1000, again..again + 1);
        b.beat(again / REPLAYS);
    }
    b.clean();
}

#[test]
fn what_is_gone_is_forgotten() {
    type End = fn(&Bench, Handle);
    let ends: [(&str, End); 4] = [
        ("unbound", |b, c| {
            b.stop(c);
            b.unbind(c);
        }),
        ("reset", |b, _| b.oracle.event(E::Reset)),
        ("turned off", |b, c| {
            b.unbind(c);
            b.oracle.event(E::Disabled { leak: Leak::default(), contexts_live: 0 });
        }),
        ("a new witness", |b, _| b.say(witness::HELLO, 0, 1)),
    ];
    for (name, end) in ends {
        let b = bench();
        let c = ctx(1, 1);
        b.bind(c);
        b.replays(QUEUE, c, VA, 0..REPLAYS);
        b.beat(LONG);
        end(&b, c);
        assert_eq!(b.oracle.state.lock().livelocks.len(), 0, "{name}");
        // Told late, by a thread that was still at it; and the place's next tenant.
        b.replays(QUEUE, c, VA, REPLAYS..REPLAYS + 1);
        b.bind(ctx(1, 2));
        b.replays(QUEUE, ctx(1, 2), VA, REPLAYS..REPLAYS + 1);
        assert_eq!(b.rules(), [""; 0], "{name}");
    }
}

#[test]
fn after_release_it_is_another_rules() {
    let b = bench();
    let c = ctx(1, 1);
    b.mirror(1, c);
    b.exit(1);
    b.endless(c, 0..REPLAYS + 1, LONG);
    assert_eq!(b.rules(), ["fault/after-release"]);
}

#[test]
fn what_is_invalidated_again_and_again_faults_again_and_again() {
    // `guest()` has a limit of 10 heartbeats.
    let stuck = |between: &dyn Fn(&range_test::Guest)| {
        let g = guest();
        g.endless(g.ctx, 0..REPLAYS, 11);
        between(&g);
        g.replays(QUEUE, g.ctx, VA, REPLAYS..REPLAYS + 1);
        g
    };
    let said = |g: &Bench| g.rules().contains(&"hang/livelock");
    assert!(said(&stuck(&|_| ())));
    for event in [spec::UNMAP, spec::CLEAR, spec::PROTECTION_VMA, spec::MIGRATE | spec::OWNED] {
        let g = stuck(&|g| {
            g.start(event, 2);
            g.end(2);
        });
        assert!(!said(&g), "{event:#x}");
        // Once it is left alone it has to get on.
        g.endless(g.ctx, REPLAYS + 1..2 * REPLAYS, 11);
        assert!(!said(&g), "{event:#x}");
        g.replays(QUEUE, g.ctx, VA, 2 * REPLAYS..2 * REPLAYS + 1);
        assert!(said(&g), "{event:#x}");
    }
    // Beside it, or in another address space.
    let start = |g: &range_test::Guest, mm: u64, at: u64| {
        let what = u64::from(spec::CLEAR | spec::BLOCKABLE) | 2 << 32;
        g.tell(witness::RANGE_START, mm, [at, at + 0xfff, what, 100]);
    };
    assert!(said(&stuck(&|g| start(g, 1, (VA & !0xfff) + 0x1000))));
    assert!(said(&stuck(&|g| {
        g.tell(witness::MM_BEGIN, 2, [2, 0, 0, 0]);
        start(g, 2, VA & !0xfff);
    })));
}

#[test]
fn while_an_invalidation_is_under_way_a_replay_is_all_that_can_be_done() {
    let g = guest();
    g.start(spec::CLEAR, 2);
    g.endless(g.ctx, 0..REPLAYS + 1, 11);
    g.clean();
    g.end(2);
    g.endless(g.ctx, REPLAYS + 1..2 * REPLAYS, 11);
    g.clean();
    g.replays(QUEUE, g.ctx, VA, 2 * REPLAYS..2 * REPLAYS + 1);
    assert_eq!(g.rules(), ["hang/livelock"]);
}

#[test]
fn who_came_late_accuses_for_what_he_has_seen() {
    let offline = |known: bool, again: Range<u32>| {
        let b = bench_with(OracleConfig { trace_bytes: LEAST_BYTES, ..OracleConfig::default() });
        let c = ctx(1, 1);
        if !known {
            b.mirror(1, c);
        }
        b.replays(QUEUE, c, VA, 0..again.start);
        for page in 0..60_000_u64 {
            b.oracle.event(E::Invalidate { ctx: ctx(60, 60), start: page << 12, last: page << 12 | 0xfff });
        }
        if known {
            b.mirror(1, c);
        }
        b.endless(c, again, LONG);
        assert_eq!(b.rules(), ["hang/livelock"], "who was there knows");
        let bytes = b.oracle.trace();
        let file = TraceFile::from_bytes(&bytes).unwrap();
        assert!(file.missing() > 0);
        check(&file).unwrap().violations.iter().map(|v| v.rule).collect::<Vec<_>>()
    };
    assert_eq!(offline(true, 500..500 + REPLAYS), [], "the first of them are not there");
    assert_eq!(offline(true, 500..500 + REPLAYS + 1), [Rule::HangLivelock]);
    assert_eq!(offline(false, 500..500 + REPLAYS + 1), [], "its release may be what is not there");
}

#[test]
fn made_up_handles_take_no_room() {
    let b = bench();
    for queue in 0..5000 {
        b.replays(queue, ctx(1, 1), VA, 0..1);
    }
    assert_eq!(b.oracle.state.lock().livelocks.len(), 1024);
}
