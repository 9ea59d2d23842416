// SPDX-License-Identifier: MIT OR Apache-2.0
//! Writes guest/include/hmm_vgpu_regs.h and docs/registers.md anew.
use std::path::Path;

fn main() -> std::io::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    std::fs::write(root.join("guest/include/hmm_vgpu_regs.h"), vgpu_spec::header::c_header())?;
    std::fs::write(root.join("docs/registers.md"), vgpu_spec::docs::registers_md())
}
