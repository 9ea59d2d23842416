// SPDX-License-Identifier: MIT OR Apache-2.0
//! A client's byte stream through the vfio-user server's framing, parser and session, with the real device behind it.
#![no_main]

use std::sync::Arc;

use hmm_testbench::machine::vfio_user::interrupts::Interrupts;
use hmm_testbench::machine::vfio_user::session::{Session, session_for_fuzzing};
use libfuzzer_sys::fuzz_target;
use vgpu::function::Function;
use vgpu::gpu::GpuConfig;
use vgpu::memory::SystemMemory;
use vgpu::testing::Rig;

fuzz_target!(|input: &[u8]| {
    let config = GpuConfig { contexts: 3, queues: 3, table_pages: 16, vram_bytes: 1 << 16, ..GpuConfig::default() };
    let rig = Rig::cold(config, 1 << 16);
    let function: Arc<dyn Function> = Arc::clone(&rig.gpu) as _;
    let interrupts = Interrupts::new(function.vectors(), function.has_msix());
    if let Ok(mut session) = Session::new(function, Arc::new(SystemMemory::new()), interrupts) {
        session_for_fuzzing(&mut session, input);
        session.close();
    }
});
