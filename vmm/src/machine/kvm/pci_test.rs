// SPDX-License-Identifier: MIT OR Apache-2.0
//! The bus from the guest's side, without KVM.

use std::sync::atomic::Ordering::SeqCst;

use proptest::prelude::*;
use vgpu::function::InterruptSink;

use super::super::host::Message;
use super::super::layout::ECAM;
use super::super::memory::GuestRam;
use super::super::rig::{
    BAR0 as BAR0_BYTES, BAR2 as BAR2_BYTES, FakeHost, REFUSED, Rig, accesses_for_fuzzing, serial_for_fuzzing,
};

use crate::machine::FunctionSlot;

const ONE: u64 = ECAM.start + (4 << 15);
const TWO: u64 = ECAM.start + (5 << 15);
const LOW: u64 = 0xc000_0000;
const HIGH: u64 = 0x40_0000_0000;

fn read(rig: &Rig, address: u64) -> u32 {
    let mut bytes = [0; 4];
    rig.ports.pci.memory_read(address, &mut bytes);
    u32::from_le_bytes(bytes)
}
fn write(rig: &Rig, address: u64, value: u32) {
    rig.ports.pci.memory_write(address, &value.to_le_bytes());
}
fn place(rig: &Rig, function: u64, bar: u64, at: u64) {
    write(rig, function + 0x10 + 4 * bar, at as u32);
    write(rig, function + 0x14 + 4 * bar, (at >> 32) as u32);
}
fn last(rig: &Rig, function: usize) -> u64 {
    rig.functions[function].last.swap(u64::MAX, SeqCst)
}
/// Where BARs are shown to the guest; the first slot is RAM.
fn shown(host: &FakeHost) -> Vec<u64> {
    host.shown.lock().iter().filter(|(slot, _)| **slot > 0).map(|(_, at)| at.start).collect()
}

#[test]
fn what_a_guest_finds() {
    let rig = Rig::new().unwrap();
    assert_eq!(read(&rig, ECAM.start), 0x0008_1b36);
    assert_eq!(read(&rig, ECAM.start + 8), 0x0600_0000);
    assert_eq!((read(&rig, ONE), read(&rig, TWO)), (0x4d47_1234, 0x4d47_1234));
    assert_eq!(read(&rig, ECAM.start + (6 << 15)), u32::MAX);
    assert_eq!(read(&rig, ONE + (1 << 12)), u32::MAX, "no second function");
    let mut word = [0; 4];
    rig.ports.write(0xcf8, &0x8000_2000_u32.to_le_bytes());
    rig.ports.read(0xcfc, &mut word);
    assert_eq!(u32::from_le_bytes(word), 0x4d47_1234);
    rig.ports.read(0xcfe, &mut word[..2]);
    assert_eq!(word[..2], [0x47, 0x4d]);
    rig.ports.read(0xcfe, &mut word);
    assert_eq!(word, [0xff; 4], "across the register's end");
}

#[test]
fn bars_are_sized_placed_moved_and_hidden() {
    let rig = Rig::new().unwrap();
    write(&rig, ONE + 0x10, u32::MAX);
    write(&rig, ONE + 0x14, u32::MAX);
    assert_eq!((read(&rig, ONE + 0x10), read(&rig, ONE + 0x14)), (!0xffff | 4, u32::MAX));
    place(&rig, ONE, 0, LOW);
    assert_eq!(read(&rig, LOW), u32::MAX, "nothing is decoded yet");
    place(&rig, ONE, 2, HIGH);
    write(&rig, ONE + 4, 2);
    assert_eq!((read(&rig, LOW + 0x1234), last(&rig, 0)), (0x5a5a_5a5a, 0x1234));
    assert_eq!(shown(&rig.host), [HIGH]);
    place(&rig, ONE, 2, LOW + BAR2_BYTES);
    assert_eq!(shown(&rig.host), [LOW + BAR2_BYTES]);
    // An access that sticks out of a BAR is nobody's.
    let mut wide = [0; 8];
    rig.ports.pci.memory_read(LOW + BAR0_BYTES - 4, &mut wide);
    assert_eq!((wide, last(&rig, 0)), ([0xff; 8], u64::MAX));
    write(&rig, ONE + 4, 0);
    assert_eq!((read(&rig, LOW), shown(&rig.host).len()), (u32::MAX, 0));
}

#[test]
fn hostile_places_answer_nothing() {
    let rig = Rig::new().unwrap();
    write(&rig, ONE + 4, 2);
    for at in [0, 0x10_0000, 0xe000_0000, 0xfec0_0000, 0xfee0_0000, 1 << 32, 0x50_0000_0000, u64::MAX << 20] {
        place(&rig, ONE, 0, at);
        place(&rig, ONE, 2, at);
        assert!(shown(&rig.host).is_empty(), "{at:#x}");
        last(&rig, 0);
        let _ = read(&rig, at);
        assert_eq!(last(&rig, 0), u64::MAX, "{at:#x}");
    }
}

#[test]
fn of_two_at_one_place_the_first_answers() {
    let rig = Rig::new().unwrap();
    for function in [TWO, ONE] {
        place(&rig, function, 0, LOW);
        place(&rig, function, 2, HIGH);
        write(&rig, function + 4, 2);
    }
    last(&rig, 1);
    let _ = read(&rig, LOW);
    assert_eq!((last(&rig, 0), last(&rig, 1)), (0, u64::MAX));
    assert_eq!(shown(&rig.host).len(), 1);
    write(&rig, ONE + 4, 0);
    let _ = read(&rig, LOW);
    assert_eq!(last(&rig, 1), 0, "the other one answers once the first has gone");
    // They change places.
    place(&rig, TWO, 2, HIGH + BAR2_BYTES);
    write(&rig, ONE + 4, 2);
    assert_eq!(shown(&rig.host).len(), 2);
    assert_eq!(*rig.host.complaint.lock(), None);
}

#[test]
fn msix_waits_behind_its_mask() {
    let rig = Rig::new().unwrap();
    place(&rig, ONE, 4, LOW);
    write(&rig, ONE + 4, 6);
    write(&rig, ONE + 0xb0, 1 << 31);
    write(&rig, LOW + 16, 0xfee0_0000);
    write(&rig, LOW + 24, 0x42);
    rig.switches[0].raise(1);
    assert_eq!((rig.host.signals(25), read(&rig, LOW + 0x800)), (0, 2), "masked: pending");
    write(&rig, LOW + 28, 0);
    assert_eq!(rig.host.routes.lock().get(&25), Some(&Message { address: 0xfee0_0000, data: 0x42 }));
    assert_eq!((rig.host.signals(25), read(&rig, LOW + 0x800)), (1, 0));
    rig.switches[0].raise(1);
    rig.switches[0].raise(7);
    assert_eq!(rig.host.signals(25), 1);
    write(&rig, ONE + 0xb0, 1 << 31 | 1 << 30);
    rig.switches[0].raise(1);
    assert_eq!(rig.host.signals(25), 0, "the whole function is masked");
    write(&rig, ONE + 0xb0, 1 << 31);
    assert_eq!(rig.host.signals(25), 1);
    write(&rig, ONE + 4, 2);
    rig.switches[0].raise(1);
    assert_eq!(rig.host.signals(25), 0, "no messages without bus mastering");
    // A function-level reset masks the table.
    write(&rig, ONE + 0x58, 1 << 15);
    place(&rig, ONE, 4, LOW);
    write(&rig, ONE + 4, 6);
    assert_eq!(read(&rig, LOW + 28), 1);
}

/// One that the hypervisor does not take harms no other vector, and is not taken for routed when the guest writes it again.
#[test]
fn a_refused_message_is_its_own_vectors_trouble() {
    let rig = Rig::new().unwrap();
    place(&rig, ONE, 4, LOW);
    write(&rig, ONE + 4, 6);
    write(&rig, ONE + 0xb0, 1 << 31);
    write(&rig, LOW, REFUSED as u32);
    for _ in 0..2 {
        write(&rig, LOW + 12, 0);
        rig.switches[0].raise(0);
        assert_eq!((rig.host.signals(24), read(&rig, LOW + 0x800)), (0, 1));
    }
    write(&rig, LOW + 16, 0xfee0_0000);
    write(&rig, LOW + 28, 0);
    rig.switches[0].raise(1);
    assert_eq!(rig.host.signals(25), 1, "the second vector works all the same");
    write(&rig, LOW, 0xfee0_0000);
    assert_eq!((rig.host.signals(24), read(&rig, LOW + 0x800)), (1, 0), "and so does the first, mended");
}

#[test]
fn msi_folds() {
    let rig = Rig::new().unwrap();
    write(&rig, ONE + 4, 6);
    write(&rig, ONE + 0x94, 0xfee0_0000);
    write(&rig, ONE + 0x9c, 0x30);
    write(&rig, ONE + 0x90, 1 << 16 | 1 << 20);
    rig.switches[0].raise(2);
    assert_eq!((rig.host.signals(24), rig.host.signals(25)), (1, 0), "the third of two is sent as the first");
    write(&rig, ONE + 0xa0, 1);
    rig.switches[0].raise(0);
    assert_eq!((rig.host.signals(24), read(&rig, ONE + 0xa4) & 1), (0, 1));
    write(&rig, ONE + 0xa0, 0);
    assert_eq!((rig.host.signals(24), read(&rig, ONE + 0xa4)), (1, 0));
}

#[test]
fn nothing_is_left_of_a_function_that_was_taken_away() {
    let rig = Rig::new().unwrap();
    place(&rig, ONE, 0, LOW);
    place(&rig, ONE, 2, HIGH);
    write(&rig, ONE + 4, 6);
    assert!(rig.memories[0].snapshot().check(0, 4096, true).is_ok());
    assert!(rig.ports.pci.remove("one") && !rig.ports.pci.remove("one"));
    assert_eq!((read(&rig, ONE), read(&rig, LOW), shown(&rig.host).len()), (u32::MAX, u32::MAX, 0));
    assert!(rig.memories[0].snapshot().check(0, 4096, false).is_err());
    rig.switches[0].raise(0);
    assert_eq!(rig.host.connected.lock().len(), 3, "only the other's vectors");
    rig.ports.pci.clear();
    let rest = FunctionSlot {
        name: "three",
        function: rig.functions[0].clone(),
        memory: rig.memories[0].clone(),
        interrupts: rig.switches[0].clone(),
    };
    let ram = GuestRam::new(&rig.layout).unwrap();
    assert!(rig.ports.pci.add(rest, &ram).is_err(), "something came after the end");
    assert!(rig.memories[0].snapshot().check(0, 4096, false).is_err());
    assert_eq!((rig.host.connected.lock().len(), rig.host.routes.lock().len()), (0, 0));
    assert_eq!(*rig.host.complaint.lock(), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn hostile_accesses(bytes in prop::collection::vec(any::<u8>(), 0..1200)) {
        prop_assert_eq!(accesses_for_fuzzing(&bytes), Ok(()));
    }

    #[test]
    fn hostile_bars(moves in prop::collection::vec((any::<bool>(), 0_u16..3, 0_u64..64, any::<bool>(), 0_u32..8), 0..60)) {
        let rig = Rig::new().unwrap();
        for (two, bar, place_at, high, command) in moves {
            let function = if two { TWO } else { ONE };
            let base = if high { HIGH } else { LOW - 0x40_0000 };
            place(&rig, function, 2 * u64::from(bar), base + (place_at << 18));
            write(&rig, function + 4, command);
            prop_assert_eq!(&*rig.host.complaint.lock(), &None);
        }
        rig.ports.pci.clear();
        prop_assert_eq!(shown(&rig.host).len(), 0);
    }

    #[test]
    fn hostile_serial(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(serial_for_fuzzing(&bytes).is_ok());
    }
}

/// Found by the fuzzer: more keys than port and socket hold, and nobody who takes them.
#[test]
fn a_guest_that_takes_no_keys_holds_nobody_up() {
    assert!(serial_for_fuzzing(&[0x08, b'x'].repeat(512)).is_ok());
}
