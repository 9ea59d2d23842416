// SPDX-License-Identifier: MIT OR Apache-2.0
//! The trace keeps what was judged, a file outlives its writer, and what is read from one is checked.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use proptest::prelude::*;
use vgpu_spec::handle::{Handle, Kind};
use vgpu_spec::pte::{HUGE, VALID, WRITE};
use vgpu_spec::range as spec;
use vgpu_spec::witness::{self, Record};

use super::super::doubt::{Cause, Doubt, Outcome};
use super::super::model_test::{Model, any_event, any_record, step};
use super::super::oracle_test::{NOT_CLEAN, PTE, VA, ctx};
use super::super::range_test::{CLEAN, guest};
use super::super::*;
use super::*;
use crate::testing::anonymous_file;

/// What counts of a violation; how often it was seen is not in a trace.
type Said = (Rule, Option<u64>, Option<u64>, Option<u64>, String, Vec<String>);

fn said(violations: Vec<Violation>) -> Vec<Said> {
    violations.into_iter().map(|v| (v.rule, v.context, v.address, v.frame, v.summary, v.events)).collect()
}

/// Sees that a check of what the oracle has written comes to the same verdict, with the same last events.
#[track_caller]
pub(in super::super) fn same_offline(oracle: &Oracle) {
    let bytes = oracle.trace();
    let file = TraceFile::from_bytes(&bytes).unwrap();
    let checked = check(&file).unwrap();
    assert_eq!(file.missing(), 0);
    assert_eq!(checked.events, oracle.trace_size().0);
    assert_eq!(said(checked.violations), said(oracle.violations()));
    let (here, there) = (oracle.counters(), checked.counters);
    let judged = |c: OracleCounters| {
        [
            c.contexts,
            c.address_spaces,
            c.releases,
            c.unregisters,
            c.heartbeats,
            c.probes_missed,
            c.bad_records,
        ]
        .into_iter()
        .chain([
            c.bad_associations,
            c.stale_answers,
            c.witness_starts,
            c.contexts_lost,
            c.ranges_judged,
            c.events,
        ])
        .collect::<Vec<_>>()
    };
    assert_eq!(judged(here), judged(there));
}

#[test]
fn every_input_is_read_back() {
    let page = crate::cpu::Page {
        kind: crate::cpu::Kind::MigrationWrite,
        frame: 0x1234_5000,
        write: true,
        dirty: false,
        soft_clean: true,
        raw: u64::MAX,
        shift: 21,
    };
    let range = Range {
        start: VA,
        last: VA + 0xfff,
        event: spec::CLEAR,
        owned: true,
        leaving: true,
        slot: 7,
        number: u64::MAX,
    };
    let (a, va, leaf) = (ctx(3, 7), VA, PTE | HUGE);
    let doubt = Doubt { beats: 2, ..Doubt::new(va, leaf, Cause::Absent) };
    let mut report = Violation::new(Rule::KernelOops, "é".repeat(100)).on(a).at(Some(va), None);
    report.events = vec!["a line".to_owned(), String::new()];
    let view = ContextView {
        released: true,
        live_leaves: 3,
        first_leaf: Some((va, PTE)),
        tlb_entries: u64::MAX,
        in_flight: Some(9),
        parked_faults: 4,
        ..ContextView::default()
    };
    let ranged = RangeView {
        busy: true,
        tlb_entries: vec![(va, PTE)],
        in_flight: Some((1, 2)),
        ..RangeView::default()
    };
    let record =
        Record { kind: 21, cpu: 3, mm: 8, arg: [1, u64::MAX, 0, 0], pid: 5, tgid: 6, time_ns: 1 << 50 };
    let mismatch = |verdict| {
        Input::Mismatch(mirror::Mismatch { ctx: a, va, leaf, access: 7, unused: true, page, verdict })
    };
    let place = private::Place { mm: 3, va, frame: 0x5000 };
    for input in [
        Input::BadRecord,
        Input::Witness(record),
        Input::Associate { record, live: true },
        Input::Ended { mm: 1 << 40 },
        Input::Over { mm: 1, slot: 2, number: 3 },
        Input::View { mm: 1, moment: Moment::End, ctx: a, view: None },
        Input::View { mm: 1, moment: Moment::Unmapped, ctx: a, view: Some(view) },
        Input::RangeView { mm: 1, range, ctx: a, view: ranged },
        Input::Excess { mm: 1, range, ctx: a, va, leaf, in_tlb: true, page },
        Input::Access { ctx: a, va, frame: 0x1234_5000, access: 3 },
        mismatch(Verdict::Absent),
        mismatch(Verdict::Moving),
        mismatch(Verdict::Wrong(Rule::MirrorWrongPage)),
        Input::Doubted { ctx: a, doubt: doubt.clone(), outcome: Outcome::Lasting },
        Input::Doubted {
            ctx: a,
            doubt: doubt.clone(),
            outcome: Outcome::Wrong(Rule::MirrorExcessRights, page),
        },
        Input::Private { ctx: a, va, vram: 0x3000, frame: 0x1_0000_0000 },
        Input::Doubted { ctx: a, doubt: doubt.clone(), outcome: Outcome::Past },
        Input::Doubted { ctx: a, doubt: doubt.clone(), outcome: Outcome::Never },
        Input::Outlived {
            ctx: a,
            page: Handle::new(Kind::DataPage, 4, 1),
            place,
            sight: Sight::Returned,
            still: true,
        },
        Input::Outlived {
            ctx: a,
            page: Handle::new(Kind::DataPage, 4, 1),
            place,
            sight: Sight::Last,
            still: false,
        },
        Input::Parked { ctx: a, parked: true },
        Input::Report(Box::new(report)),
        Input::Gap("the witness missed 3 probes".to_owned()),
        Input::Device {
            event: DeviceEvent::ContextUnbound { ctx: a, leak: NOT_CLEAN },
            told: true,
            attended: false,
        },
        Input::Device {
            event: DeviceEvent::LeafSet { ctx: a, va: Some(va), pte: leaf },
            told: true,
            attended: true,
        },
        Input::Device {
            event: DeviceEvent::DataGranted { ctx: a, page: Handle::new(Kind::DataPage, 4, 1) },
            told: false,
            attended: false,
        },
        Input::Device {
            event: DeviceEvent::DataReturned { ctx: a, page: Handle::new(Kind::DataPage, 4, 1) },
            told: true,
            attended: false,
        },
        Input::Device {
            event: DeviceEvent::JobDone { ctx: a, queue: Handle::new(Kind::Queue, 1, 2), status: 3 },
            told: false,
            attended: false,
        },
        Input::Device {
            event: DeviceEvent::Unusable {
                ctx: a,
                queue: Handle::new(Kind::Queue, 1, 2),
                why: Unusable::QueueMemory,
            },
            told: true,
            attended: false,
        },
        Input::Device {
            event: DeviceEvent::RingFreed {
                ring: RingView { used: RingUse::Queue, ctx: a, queue: Handle::new(Kind::Queue, 1, 2) },
                start: 0x1_2340_5000,
                last: 0x1_2340_5fff,
            },
            told: true,
            attended: false,
        },
        Input::Device {
            event: DeviceEvent::RingFreed {
                ring: RingView { used: RingUse::Commands, ctx: Handle::NONE, queue: Handle::NONE },
                start: 1,
                last: 1,
            },
            told: true,
            attended: false,
        },
        Input::Device {
            event: DeviceEvent::Unusable {
                ctx: Handle::NONE,
                queue: Handle::NONE,
                why: Unusable::CommandArea,
            },
            told: true,
            attended: false,
        },
        Input::Device { event: faulted(a, 0), told: true, attended: false },
        Input::Device { event: faulted(a, u32::MAX), told: true, attended: false },
    ] {
        let mut bytes = Vec::new();
        codec::encode(&input, &mut bytes);
        let back = codec::decode(&bytes).unwrap_or_else(|| panic!("{input:?}"));
        assert_eq!(format!("{back:?}"), format!("{input:?}"));
        assert!(!text::render(&input).is_empty());
        assert_eq!(codec::is_heartbeat(&bytes), is_beat(&input));
        for end in 0..bytes.len() {
            assert!(codec::decode(&bytes[..end]).is_none(), "{input:?} cut at {end}");
        }
    }
}

#[test]
fn names_of_operations_are_read_back() {
    for name in ["INVALIDATE", "DOORBELL", "CTX_UNBIND", "walk", "leaf", "command"] {
        let event = DeviceEvent::BadHandle {
            op: name,
            handle: ctx(1, 1),
            issued_before: true,
            by: None,
            va: Some(5),
        };
        let mut bytes = Vec::new();
        codec::encode(&Input::Device { event, told: true, attended: false }, &mut bytes);
        let Some(Input::Device { event: back, .. }) = codec::decode(&bytes) else { panic!("{name}") };
        assert_eq!(back, event);
    }
}

#[test]
fn every_event_has_a_text() {
    let a = ctx(1, 1);
    let text = |event| text::render(&Input::Device { event, told: true, attended: false });
    assert_eq!(
        text(DeviceEvent::JobDone { ctx: a, queue: Handle::new(Kind::Queue, 0, 1), status: 3 }),
        "device: context 1#1 job of queue 0#1 done, JOB_KILLED"
    );
    assert_eq!(
        text(DeviceEvent::BadHandle {
            op: "INVALIDATE",
            handle: a,
            issued_before: true,
            by: None,
            va: Some(0x1000)
        }),
        "device: INVALIDATE named context 1#1, stale, address 0x1000"
    );
    assert_eq!(
        text(DeviceEvent::LeafSet { ctx: a, va: Some(0x1000), pte: VALID | WRITE | 0x5000 }),
        "device: context 1#1 leaf set at 0x1000: [0x5000 rw-]"
    );
    assert_eq!(text(faulted(a, 0)), "device: context 1#1 fault 200#70000 raised at 0x7f0000001000 (write)");
    assert_eq!(
        text(faulted(a, 17)),
        "device: context 1#1 fault 200#70000 raised at 0x7f0000001000 (write), again after 17 in a row"
    );
}

fn faulted(ctx: Handle, again: u32) -> DeviceEvent {
    DeviceEvent::FaultRaised { fault: Handle::new(Kind::Fault, 200, 70_000), ctx, va: VA, access: 2, again }
}

fn leaf(ctx: Handle, page: u64) -> DeviceEvent {
    DeviceEvent::LeafSet { ctx, va: Some(page << 12), pte: VALID | page << 12 }
}

#[test]
fn the_ring_keeps_the_newest_and_filters() {
    let config = OracleConfig { trace_bytes: 1 << 20, ..OracleConfig::default() };
    let oracle = Oracle::new(config);
    let (a, b) = (ctx(1, 1), ctx(2, 1));
    oracle.event(DeviceEvent::ContextBound { ctx: a, tag: 7 });
    for page in 0..200_000 {
        oracle.event(leaf(if page % 2 == 0 { a } else { b }, page));
    }
    oracle.witness(&Record { kind: witness::MM_RELEASED, mm: 3, ..Record::default() });
    assert_eq!(oracle.trace_size().0, 200_002);
    let all = oracle.trace.last(Some(a), Some(3), None);
    assert_eq!(all.len(), LAST);
    assert!(
        all[LAST - 1].starts_with("#200001 ")
            && all[LAST - 1].contains("release has returned for address space 3")
    );
    assert!(all[0].contains("context 1#1"));
    let page = oracle.trace.last(Some(a), Some(3), Some(199_998 << 12 | 8));
    assert_eq!(page.len(), 2, "{page:?}");
    assert!(page[0].contains("leaf set at 0x30d3e000"), "{page:?}");
    assert!(
        oracle.trace.last(Some(a), None, Some(199_999 << 12)).is_empty(),
        "that page is the other context's"
    );
    let bytes = oracle.trace();
    assert!(bytes.len() <= 1 << 20);
    let file = TraceFile::from_bytes(&bytes).unwrap();
    let checked = check(&file).unwrap();
    assert!(file.missing() > 100_000 && checked.violations.is_empty());
    assert_eq!(checked.events + file.missing(), 200_002);
}

#[test]
fn what_says_the_same_in_a_row_is_one_line() {
    let oracle = Oracle::new(OracleConfig::default());
    let a = ctx(1, 1);
    let clear = DeviceEvent::Invalidate { ctx: a, start: 0x1000, last: 0x1fff };
    oracle.event(leaf(a, 1));
    for other in 5..10 {
        oracle.event(clear);
        oracle.event(leaf(a, other));
    }
    oracle.event(leaf(a, 1));
    let lines = oracle.trace.last(Some(a), None, Some(0x1000));
    assert_eq!(
        lines,
        [
            "#0 beat 0 device: context 1#1 leaf set at 0x1000: [0x1000 r--]",
            "#1 beat 0 device: context 1#1 invalidate 0x1000-0x1fff begins, 5 times until #9",
            "#11 beat 0 device: context 1#1 leaf set at 0x1000: [0x1000 r--]",
        ]
    );
}

#[test]
fn an_event_takes_few_bytes() {
    let oracle = Oracle::new(OracleConfig::default());
    for page in 0x7f12_3456_7000_u64..0x7f12_3456_8000 {
        oracle.event(DeviceEvent::LeafSet { ctx: ctx(3, 70_000), va: Some(page << 12), pte: 0x3_2345_6007 });
        oracle.event(DeviceEvent::Invalidate {
            ctx: ctx(3, 70_000),
            start: page << 12,
            last: page << 12 | 0xfff,
        });
        oracle.witness(&Record {
            kind: witness::RANGE_START,
            cpu: 1,
            mm: 12_345,
            arg: [page << 12, page << 12 | 0xfff, u64::from(spec::CLEAR | spec::BLOCKABLE) | 5 << 32, page],
            pid: 123_456,
            tgid: 123_456,
            time_ns: 3_600_000_000_000,
        });
    }
    let (events, bytes) = oracle.trace_size();
    assert!(bytes <= 32 * events, "{bytes} bytes for {events} events");
    // One that says as much as it can.
    oracle.event(faulted(ctx(63, u32::MAX), u32::MAX));
    let fault = oracle.trace_size().1 - bytes;
    assert!(fault <= 32, "{fault} bytes");
}

fn file_of(bytes: u64) -> File {
    anonymous_file(file_bytes(bytes))
}

/// A driver that forgets its teardown, and a stale handle.
fn broken(oracle: &Oracle) {
    let a = ctx(1, 1);
    for (kind, arg) in [(witness::HELLO, 1), (witness::MM_BEGIN, 2), (witness::NOTIFIER_ADDED, 2)] {
        oracle.witness(&Record { kind, mm: 1, arg: [arg, 0, 0, 0], ..Record::default() });
    }
    oracle.event(DeviceEvent::ContextBound { ctx: a, tag: 1 });
    let handle = ctx(9, 9);
    oracle.event(DeviceEvent::BadHandle { op: "DOORBELL", handle, issued_before: true, by: None, va: None });
    oracle.report(Violation::new(Rule::KernelWarn, "WARNING: at mm/memory.c"));
}

#[test]
fn a_file_outlives_its_writer() {
    let config = OracleConfig { trace_bytes: LEAST_BYTES, ..OracleConfig::default() };
    let file = file_of(LEAST_BYTES);
    let oracle = Oracle::with_trace(config, file.try_clone().unwrap(), "run release --seed 7").unwrap();
    broken(&oracle);
    // Nothing was closed, as after kill -9: the mapping is all there was.
    let read = TraceFile::open(&file).unwrap();
    assert!(!read.closed() && read.missing() == 0);
    assert_eq!(read.about(), "run release --seed 7");
    let checked = check(&read).unwrap();
    assert_eq!(said(checked.violations), said(oracle.violations()));
    let rules: Vec<_> = oracle.violations().iter().map(|v| v.rule).collect();
    assert_eq!(rules, [Rule::UnregisterTouch, Rule::KernelWarn]);
    oracle.finish(&["interrupted".to_owned()]).unwrap();
    let read = TraceFile::open(&file).unwrap();
    assert!(read.closed());
    assert_eq!(file.metadata().unwrap().len(), 4096 + BLOCK as u64);
    let checked = check(&read).unwrap();
    assert_eq!((checked.gaps, checked.violations.len()), (vec!["interrupted".to_owned()], 2));
    // What is told after the end is nobody's.
    broken(&oracle);
    oracle.finish(&[]).unwrap();
    assert_eq!(check(&TraceFile::open(&file).unwrap()).unwrap().events, checked.events);
}

#[test]
fn a_file_that_is_too_short_is_refused() {
    let error = Oracle::with_trace(OracleConfig::default(), file_of(LEAST_BYTES), "").err().unwrap();
    assert!(error.to_string().contains("shorter"), "{error}");
}

#[test]
fn what_is_no_trace_is_refused() {
    let oracle = Oracle::new(OracleConfig::default());
    broken(&oracle);
    let good = oracle.trace();
    let refused = |change: &dyn Fn(&mut Vec<u8>), what: &str| {
        let mut bytes = good.clone();
        change(&mut bytes);
        let said = match TraceFile::from_bytes(&bytes).and_then(|file| check(&file).map(drop)) {
            Ok(()) => panic!("{what}: taken"),
            Err(error) => error.to_string(),
        };
        assert!(said.contains(what), "{said}, not {what}");
    };
    refused(&|b| b.clear(), "no trace");
    refused(&|b| b.truncate(7), "no trace");
    refused(&|b| b[0] = b'X', "no trace");
    refused(&|b| b.truncate(100), "cut off");
    refused(&|b| b.truncate(5000), "cut off");
    refused(&|b| b[8] = 99, "version 99");
    refused(&|b| b[16..20].fill(0), "size");
    refused(&|b| b[20] = 0xff, "settings");
    refused(&|b| b[49] = 0xff, "no text");
    refused(&|b| b[HEADER] = 2, "not in its place");
    refused(&|b| b[HEADER + 8] = 5, "event #0");
    refused(&|b| b[HEADER + 26] = 0xff, "damaged at byte 0x1018");
    refused(&|b| b[HEADER + BLOCK_HEADER + 4] ^= 1, "damaged at byte 0x1020, event #0");
    refused(&|b| b[HEADER + 24] -= 1, "damaged at byte");
}

#[test]
fn a_damaged_file_is_no_reason_to_panic() {
    let file = file_of(LEAST_BYTES);
    file.write_all_at(b"HMMTRACE", 0).unwrap();
    assert!(TraceFile::open(&file).is_err());
    assert!(check(&TraceFile::from_bytes(&Oracle::new(OracleConfig::default()).trace()).unwrap()).is_ok());
}

/// Things that happen to the process of [`guest`].
#[derive(Clone, Debug)]
enum Move {
    Cpu(usize),
    Device(bool, bool, bool, bool),
    Start(u32, u64),
    End(u64),
    RangeEnd(u32, u64),
    Leaf(usize),
    Access(usize, bool),
    Beat,
    Beats,
    Clean,
    Notifier(bool),
    Returned,
    Fault(u32),
    /// Replays of an access that had as many before.
    Replays(u32),
    Answer(u32),
    Release,
    Unmapped,
    Gone,
}

fn moves() -> impl Strategy<Value = Move> {
    let event = || {
        prop_oneof![
            Just(spec::UNMAP),
            Just(spec::CLEAR),
            Just(spec::PROTECTION_PAGE),
            Just(spec::PROTECTION_VMA),
            Just(spec::SOFT_DIRTY),
            Just(spec::MIGRATE | spec::OWNED),
            Just(spec::MIGRATE),
            Just(spec::UNMAP | spec::LEAVING),
        ]
    };
    prop_oneof![
        4 => (0..6usize).prop_map(Move::Cpu),
        4 => any::<(bool, bool, bool, bool)>().prop_map(|(a, b, c, d)| Move::Device(a, b, c, d)),
        4 => (event(), 0..4u64).prop_map(|(event, slot)| Move::Start(event, slot)),
        4 => (0..4u64).prop_map(Move::End),
        2 => (event(), 0..4u64).prop_map(|(event, slot)| Move::RangeEnd(event, slot)),
        4 => (0..4usize).prop_map(Move::Leaf),
        6 => (0..4usize, any::<bool>()).prop_map(|(leaf, write)| Move::Access(leaf, write)),
        6 => Just(Move::Beat),
        1 => Just(Move::Clean),
        1 => any::<bool>().prop_map(Move::Notifier),
        1 => Just(Move::Returned),
        2 => (0..4u32).prop_map(Move::Fault),
        2 => (0..3u32).prop_map(|many| Move::Replays(many * 600)),
        2 => Just(Move::Beats),
        2 => (0..4u32).prop_map(Move::Answer),
        1 => Just(Move::Release),
        1 => Just(Move::Unmapped),
        1 => Just(Move::Gone),
    ]
}

fn play(g: &range_test::Guest, moves: &[Move]) {
    const CPU: [u64; 6] = [
        0,
        0x8000_0000_1234_5867,
        0x8000_0000_1234_5865,
        0x8000_0000_2222_2867,
        // A migration entry, by the numbers that guest() gives; and a device-private one.
        29 << 59 | (!0x1_2345_u64 << 14 >> 5),
        27 << 59 | (!0x9_0000_u64 << 14 >> 5),
    ];
    let leaves = [PTE, PTE & !WRITE, VALID | WRITE | pte::VRAM | 0x5000, VALID | HUGE | 0x1220_0000];
    for one in moves {
        match *one {
            Move::Cpu(which) => g.cpu(CPU[which]),
            Move::Device(busy, leaf, tlb, flight) => g.device(RangeView {
                busy,
                leaves: if leaf { vec![(VA, PTE)] } else { Vec::new() },
                tlb_entries: if tlb { vec![(VA, PTE)] } else { Vec::new() },
                in_flight: flight.then_some((VA, PTE)),
                ..RangeView::default()
            }),
            Move::Start(event, slot) => g.start(event, slot),
            Move::End(slot) => g.end(slot),
            Move::RangeEnd(event, slot) => {
                g.tell(witness::RANGE_END, 1, [VA, VA + 0xfff, u64::from(event) | slot << 32, 100 + slot]);
            }
            Move::Leaf(which) => g.leaf(leaves[which]),
            Move::Access(which, write) => {
                if let Some(compare) = g.oracle.compare(g.ctx) {
                    compare.page(VA, leaves[which], if write { 3 } else { 1 });
                }
                g.oracle.access(g.ctx, VA, leaves[which], 1);
            }
            Move::Beat => g.beat(1),
            Move::Beats => g.beat(11),
            Move::Clean => {
                g.cpu(CLEAN);
                g.writes();
                g.start(spec::CLEAR, 1);
                g.says_clean(1);
            }
            Move::Notifier(more) => {
                let kind = if more { witness::NOTIFIER_ADDED } else { witness::NOTIFIER_REMOVED };
                g.tell(kind, 1, [2, 0, 0, 0]);
            }
            Move::Returned => {
                let page = Handle::new(Kind::DataPage, 5, 1);
                g.oracle.event(DeviceEvent::DataReturned { ctx: g.ctx, page });
            }
            Move::Fault(number) => g.raise(g.ctx, number),
            // Not each of them: a few say as much.
            Move::Replays(before) => (before..before + 601).step_by(300).for_each(|again| {
                let fault = Handle::new(Kind::Fault, 9, again + 1);
                g.oracle.event(DeviceEvent::FaultRaised { fault, ctx: g.ctx, va: VA, access: 1, again });
                g.oracle.event(DeviceEvent::FaultReplayed { fault, ctx: g.ctx, va: VA });
            }),
            Move::Answer(number) => {
                let fault = Handle::new(Kind::Fault, number, 1);
                g.oracle.event(DeviceEvent::FaultReplayed { fault, ctx: g.ctx, va: VA });
            }
            Move::Release => g.tell(witness::MM_RELEASED, 1, [0; 4]),
            Move::Unmapped => g.tell(witness::MM_UNMAPPED, 1, [0; 4]),
            Move::Gone => g.tell(witness::MM_END, 1, [0; 4]),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn a_correct_driver_is_correct_offline(steps in prop::collection::vec(step(), 0..200)) {
        let mut model = Model::new();
        for step in &steps {
            model.run(step);
        }
        same_offline(&model.oracle);
    }

    #[test]
    fn broken_invalidations_are_found_offline(moves in prop::collection::vec(moves(), 0..120)) {
        let g = guest();
        play(&g, &moves);
        same_offline(&g.oracle);
    }

    #[test]
    fn garbage_is_the_same_garbage_offline(
        ops in prop::collection::vec(prop_oneof![any_event().prop_map(Ok), any_record().prop_map(Err)], 0..200),
        live in prop::collection::vec((0..4u32, 0..4u32, any::<bool>(), any::<u64>()), 0..8),
    ) {
        let model = Model::new();
        for (index, generation, released, n) in live {
            let view = ContextView { released, live_leaves: n, first_leaf: Some((n, n)), in_flight: (n % 3 == 0).then_some(n), ..ContextView::default() };
            model.view(Handle::new(Kind::Context, index, generation), |v| *v = view);
        }
        for op in ops {
            match op {
                Ok(event) => model.oracle.event(event),
                Err(record) => model.oracle.witness(&record),
            }
        }
        same_offline(&model.oracle);
    }

    #[test]
    fn a_ring_that_came_round_accuses_nobody_else(
        before in prop::collection::vec(step(), 0..60), after in prop::collection::vec(step(), 0..60), moves in prop::collection::vec(moves(), 0..60),
    ) {
        // What was before is lost; a correct driver is not accused for it.
        let mut model = Model::small();
        before.iter().for_each(|step| model.run(step));
        fill(&model.oracle);
        after.iter().for_each(|step| model.run(step));
        let bytes = model.oracle.trace();
        let file = TraceFile::from_bytes(&bytes).unwrap();
        prop_assert!(file.missing() > 0);
        let checked = check(&file).unwrap();
        prop_assert!(checked.violations.is_empty(), "{:#?}", checked.violations);
        // Of a broken one no more is said than was seen.
        let g = guest();
        let (early, late) = moves.split_at(moves.len() / 2);
        play(&g, early);
        fill(&g.oracle);
        play(&g, late);
        let bytes = g.oracle.trace();
        let checked = check(&TraceFile::from_bytes(&bytes).unwrap()).unwrap();
        let seen: Vec<_> = g.oracle.violations().iter().map(|v| (v.rule, v.context)).collect();
        for violation in checked.violations {
            prop_assert!(seen.contains(&(violation.rule, violation.context)), "{violation:#?}");
        }
    }

    #[test]
    fn damage_is_an_error_or_harmless(
        moves in prop::collection::vec(moves(), 0..60),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let g = guest();
        play(&g, &moves);
        let mut bytes = g.oracle.trace();
        // Most of a block is empty: the damage is to meet what is not.
        let full = HEADER + BLOCK_HEADER + g.oracle.trace_size().1 as usize;
        for (at, byte) in changes {
            let at = at.index(full.min(bytes.len()));
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Ok(file) = TraceFile::from_bytes(&bytes) {
            let _ = (check(&file), file.about(), file.missing());
        }
    }

    #[test]
    fn any_bytes_are_no_reason_to_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Some(input) = codec::decode(&bytes) {
            let mut back = Vec::new();
            codec::encode(&input, &mut back);
            let _ = (text::render(&input), text::concerns(&input, None, None, Some(0)));
            let oracle = Oracle::new(OracleConfig { trace_bytes: LEAST_BYTES, ..OracleConfig::default() });
            check::replay_for_test(&oracle, input);
        }
    }
}

/// Pushes everything out of the ring that is in it.
fn fill(oracle: &Arc<Oracle>) {
    for page in 0..60_000 {
        oracle.event(DeviceEvent::Invalidate {
            ctx: ctx(60, 60),
            start: page << 12,
            last: page << 12 | 0xfff,
        });
    }
}
