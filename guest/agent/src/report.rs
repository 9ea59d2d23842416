// SPDX-License-Identifier: MIT OR Apache-2.0
//! Telling the host: through the witness where there is one, on the console otherwise.

use std::fs::{File, OpenOptions};
use std::io::Write;

use guest_protocol::{CONSOLE_PREFIX, MAX_MESSAGE, Message};
use vgpu_spec::uapi::WITNESS_DEVICE;

/// Takes messages.
pub(crate) trait Sink: Sync {
    /// Sends one. What cannot be sent is lost: there is nobody else to tell.
    fn send(&self, message: &Message);
}

/// The host.
#[derive(Debug, Default)]
pub(crate) struct Host {
    witness: Option<File>,
}

impl Host {
    /// Opens the witness, which must be loaded.
    pub(crate) fn open_witness(&mut self) -> std::io::Result<()> {
        self.witness = Some(OpenOptions::new().read(true).write(true).open(WITNESS_DEVICE)?);
        Ok(())
    }

    /// The open witness, if there is one.
    pub(crate) fn witness(&self) -> Option<&File> {
        self.witness.as_ref()
    }

    /// Closes the witness, so that it can be unloaded. Messages go to the console from now on.
    pub(crate) fn close_witness(&mut self) {
        self.witness = None;
    }
}

impl Sink for Host {
    fn send(&self, message: &Message) {
        let Ok(json) = serde_json::to_vec(message) else { return };
        if json.len() <= MAX_MESSAGE {
            if let Some(mut witness) = self.witness.as_ref() {
                if matches!(witness.write(&json), Ok(written) if written == json.len()) {
                    return;
                }
            }
        }
        let mut line = CONSOLE_PREFIX.as_bytes().to_vec();
        line.extend_from_slice(&json);
        console(line);
    }
}

/// Writes a line to the console in one piece, so that other writers come before or after it. Serial consoles want CR LF, which
/// the terminal layer makes of the newline.
pub(crate) fn console(mut line: Vec<u8>) {
    line.push(b'\n');
    // Nothing is left to complain to.
    let _ = std::io::stderr().write_all(&line);
}

/// For people who read the console.
pub(crate) fn note(text: &str) {
    console(format!("init: {text}").into_bytes());
}
