// SPDX-License-Identifier: MIT OR Apache-2.0
//! Page tables of any content: loops, entries of another level, reserved bits, pages of another context. Every walk ends, and
//! what an engine may touch is what the tables say.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vgpu::gpu::GpuConfig;
use vgpu::oracle::Inspect as _;
use vgpu::testing::{RAM, Rig};
use vgpu_spec::command::OP_WRITE_PTE;
use vgpu_spec::job::{JOB_BUS_ERROR, JOB_OK, Job, OP_FILL};
use vgpu_spec::pte::{ADDRESS, VALID};

const RAM_BYTES: u64 = 1 << 20;

fuzz_target!(|input: &[u8]| {
    let config = GpuConfig { contexts: 3, queues: 3, table_pages: 16, vram_bytes: 1 << 16, ..GpuConfig::default() };
    let rig = Rig::new(config, RAM_BYTES);
    let mut space = rig.bind();
    let tables = [space.table(0, 0), space.table(1, 0), space.table(2, 0), space.table(3, 0)];
    let mut queue = space.queue(4);
    let mut jobs = 0;
    for op in input.chunks_exact(12).take(256) {
        let [kind, slot, index, flags, value @ ..] = op else { break };
        let mut bytes = [0; 8];
        bytes.copy_from_slice(value);
        let raw = u64::from_le_bytes(bytes);
        if kind % 4 < 3 {
            // An entry as it is, one that leads into memory, or one that leads to another table.
            let entry = match kind % 4 {
                0 => raw,
                1 => (RAM + raw % RAM_BYTES) & ADDRESS | u64::from(*flags) & 0x1f | VALID,
                _ => (raw % 20) << 12 | VALID,
            };
            let index = u64::from(*index % 4) | if *flags & 0x80 != 0 { 508 } else { 0 };
            rig.run(OP_WRITE_PTE, space.ctx, [tables[usize::from(*slot % 4)].0, index, entry, 0, 0]);
        } else if jobs < 8 {
            jobs += 1;
            let at = u64::from(*slot % 4) << 39 | u64::from(*index % 4) << 30 | (raw % 8) << 21 | (raw >> 8) % 4 << 12;
            let job = Job { op: OP_FILL, dst: at, len: 64, operand: [raw, 1, 0], ..Job::default() };
            let number = queue.submit(&rig, job);
            queue.ring(&rig);
            let mut patience = 0;
            // It ends, or it is parked.
            let done = loop {
                if let Some(completion) = queue.completion(&rig, number) {
                    break Some(completion);
                }
                patience += 1;
                if rig.next_fault().is_some() || patience > 10_000 {
                    break None;
                }
                std::thread::yield_now();
            };
            match done {
                Some(completion) => assert!(matches!(completion.status, JOB_OK | JOB_BUS_ERROR)),
                None => break,
            }
        }
        if let Some(view) = rig.gpu.context(space.ctx) {
            assert_eq!(view.live_leaves == 0, view.first_leaf.is_none());
        }
    }
    rig.gpu.shutdown();
    rig.gpu.assert_consistent();
});
