// SPDX-License-Identifier: MIT OR Apache-2.0
//! Listening sockets without a name, so that nothing is left behind however the testbench ends.
//!
//! QEMU's vfio-user client only knows sockets by path: it refuses file descriptors and ignores the abstract namespace (11.1). But
//! a path may lead through `/proc/self/fd`: a socket that was bound, opened as a location (`O_PATH`) and unlinked can still be
//! connected to through that descriptor, which QEMU inherits. So the name is there for some microseconds only, in a folder that
//! nobody else may enter.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;

use rustix::fs::{AtFlags, Mode, OFlags, openat, unlinkat};

/// Begins the folder's name.
const PREFIX: &str = "hmm-testbench-sockets-";

/// A place where one client can connect.
pub(super) struct Rendezvous {
    /// Accepts it.
    pub listener: UnixListener,
    /// The socket's location: whoever inherits this connects to `/proc/self/fd/` and its number.
    pub location: OwnedFd,
}

/// Makes `count` of them.
pub(super) fn rendezvous(count: usize) -> io::Result<Vec<Rendezvous>> {
    let folder = tempfile::Builder::new().prefix(PREFIX).tempdir()?;
    let directory = File::open(folder.path())?;
    (0..count).map(|_| unnamed(&directory)).collect()
}

fn unnamed(directory: &File) -> io::Result<Rendezvous> {
    // Socket addresses are short (108 bytes); the way through the descriptor always fits.
    let listener = UnixListener::bind(format!("/proc/self/fd/{}/socket", directory.as_raw_fd()))?;
    let location =
        openat(directory.as_fd(), "socket", OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty());
    unlinkat(directory.as_fd(), "socket", AtFlags::empty())?;
    Ok(Rendezvous { listener, location: location? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn connects_without_a_name() {
        for Rendezvous { listener, location } in rendezvous(3).unwrap() {
            let mut client = UnixStream::connect(format!("/proc/self/fd/{}", location.as_raw_fd())).unwrap();
            let mut server = listener.accept().unwrap().0;
            client.write_all(b"x").unwrap();
            server.read_exact(&mut [0]).unwrap();
        }
        let left = std::fs::read_dir(std::env::temp_dir()).unwrap().flatten();
        assert!(!left.into_iter().any(|entry| entry.file_name().to_string_lossy().starts_with(PREFIX)));
    }
}
