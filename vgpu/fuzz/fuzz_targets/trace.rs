// SPDX-License-Identifier: MIT OR Apache-2.0
//! `check`'s reader and the oracle behind it: a file of any bytes, and a sound file of any records.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vgpu::oracle::{TraceFile, check, file_of_records};

fn judge(bytes: &[u8]) {
    if let Ok(file) = TraceFile::from_bytes(bytes) {
        if let Ok(checked) = check(&file) {
            assert!(checked.violations.len() <= 1 << 20);
        }
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((&how, rest)) = input.split_first() else { return };
    if how % 4 == 0 {
        return judge(rest);
    }
    // A byte of length before each record.
    let mut rest = rest;
    let records = std::iter::from_fn(|| {
        let (&length, more) = rest.split_first()?;
        let (record, more) = more.split_at(usize::from(length).min(more.len()));
        rest = more;
        Some(record)
    });
    let mut file = file_of_records(records.filter(|record| !record.is_empty()));
    if how % 4 == 1 {
        // With a byte of it changed.
        let at = usize::from(how) * 251 % file.len();
        file[at] ^= how;
    }
    judge(&file);
});
