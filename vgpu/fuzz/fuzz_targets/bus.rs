// SPDX-License-Identifier: MIT OR Apache-2.0
//! The native machine's bus: configuration space, BARs that move anywhere, MSI-X tables and ports, as a hostile guest uses them.
#![no_main]

use hmm_testbench::machine::kvm::accesses_for_fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let broken = accesses_for_fuzzing(&input[..input.len().min(12 * 512)]);
    assert_eq!(broken, Ok(()));
});
