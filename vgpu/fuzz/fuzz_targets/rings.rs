// SPDX-License-Identifier: MIT OR Apache-2.0
//! The command ring, queues of jobs and the fault buffer, with commands and jobs of which most make some sense.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vgpu::gpu::GpuConfig;
use vgpu::testing::Rig;
use vgpu::testing::input::{play, scene};

fuzz_target!(|input: &[u8]| {
    let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
    let ops: Vec<(u8, [u64; 4])> = input
        .chunks_exact(33)
        .take(128)
        .map(|op| (op[0], [word(&op[1..9]), word(&op[9..17]), word(&op[17..25]), word(&op[25..33])]))
        .collect();
    let config = GpuConfig { contexts: 3, queues: 3, table_pages: 16, vram_bytes: 1 << 16, ..GpuConfig::default() };
    let rig = Rig::new(config, 1 << 20);
    scene(&rig);
    play(&rig, &ops);
    rig.gpu.shutdown();
    rig.gpu.assert_consistent();
});
