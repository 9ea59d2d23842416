// SPDX-License-Identifier: MIT OR Apache-2.0
//! The native machine's serial port, with somebody typing at the same time.
#![no_main]

use hmm_testbench::machine::kvm::serial_for_fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let done = serial_for_fuzzing(&input[..input.len().min(1024)]);
    assert!(done.is_ok());
});
