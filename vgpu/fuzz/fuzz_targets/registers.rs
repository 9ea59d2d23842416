// SPDX-License-Identifier: MIT OR Apache-2.0
//! Any access of any width to the register file, the window, VRAM and configuration space, with rings that may point anywhere.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vgpu::function::Function as _;
use vgpu::gpu::GpuConfig;
use vgpu::testing::Rig;

fuzz_target!(|input: &[u8]| {
    let config = GpuConfig { contexts: 3, queues: 3, table_pages: 16, vram_bytes: 1 << 16, ..GpuConfig::default() };
    let rig = Rig::new(config, 1 << 20);
    for access in input.chunks_exact(13).take(512) {
        let [kind, o0, o1, o2, width, value @ ..] = access else { break };
        let offset = u32::from_le_bytes([*o0, *o1, *o2, 0]);
        let width = usize::from(*width % 9);
        let mut data = [0; 8];
        data.copy_from_slice(value);
        match kind % 5 {
            0 => drop(rig.gpu.bar_write(0, u64::from(offset) % 0x1_0010, &data[..width])),
            // Registers are 32 bits wide and most lie low: the ways in that do something.
            1 => drop(rig.gpu.bar_write(0, u64::from(offset) % 0x100 & !3, &data[..4])),
            2 => rig.gpu.bar_read(kind / 5 % 6, u64::from(offset), &mut data[..width]),
            3 => drop(rig.gpu.config_write(offset as u16, &data[..width])),
            _ => rig.gpu.config_read(offset as u16, &mut data[..width]),
        }
    }
    rig.gpu.shutdown();
    rig.gpu.assert_consistent();
});
