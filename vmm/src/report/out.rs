// SPDX-License-Identifier: MIT OR Apache-2.0
//! The folder of `--out`.

use std::fs::{self, File};
use std::io::{self, Read as _, Write};
use std::path::{Path, PathBuf};

use super::junit;
use super::results::Results;
use crate::failure::{Failure, Result};

/// The console of the outer guest of a nested run.
const OUTER_CONSOLE: &str = "console-outer.log";
/// What the oracle judged.
pub const TRACE: &str = "trace";

/// A folder that results go to.
#[derive(Clone, Debug)]
pub struct OutDir {
    dir: PathBuf,
}

impl OutDir {
    /// Makes the folder if needed and sees that it can be written; what an earlier run left there is removed, so that it is not
    /// taken for this one's.
    pub fn prepare(dir: &Path) -> Result<Self> {
        let refuse = |error: io::Error| {
            Failure::usage(format!("--out {}: cannot be written: {error}", dir.display()))
                .remedy("give a folder that is writable, or one that can be made")
        };
        if dir.exists() && !dir.is_dir() {
            return Err(Failure::usage(format!("--out {}: exists and is not a folder", dir.display())));
        }
        fs::create_dir_all(dir).map_err(refuse)?;
        let dir = dir.canonicalize().map_err(refuse)?;
        let probe = dir.join(format!(".probe-{}", std::process::id()));
        File::create(&probe).map_err(refuse)?;
        fs::remove_file(&probe).map_err(refuse)?;
        for name in ["results.json", "junit.xml", "console.log", OUTER_CONSOLE, TRACE] {
            match fs::remove_file(dir.join(name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(refuse(error)),
                _ => {}
            }
        }
        Ok(Self { dir })
    }

    /// Begins the console's log.
    pub fn console_log(&self) -> Result<File> {
        self.log("console.log")
    }

    /// Begins the log of an outer guest's console.
    pub fn outer_console_log(&self) -> Result<File> {
        self.log(OUTER_CONSOLE)
    }

    /// Begins the trace: a file of so many zeroes, with all its blocks there.
    pub fn trace(&self, bytes: u64) -> Result<File> {
        let path = self.dir.join(TRACE);
        let refuse = |error: io::Error| {
            Failure::environment(format!("cannot make {} of {bytes} bytes: {error}", path.display()))
                .remedy("make room, or give a smaller --trace-bytes")
        };
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path);
        let file = file.map_err(refuse)?;
        match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes) {
            Ok(()) => Ok(file),
            // A file system that cannot: the blocks are there once they have been written.
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {
                io::copy(&mut io::repeat(0).take(bytes), &mut &file).map_err(refuse)?;
                Ok(file)
            }
            Err(error) => {
                let _ = fs::remove_file(&path);
                Err(refuse(error.into()))
            }
        }
    }

    /// Begins a trace that was written elsewhere.
    pub fn trace_copy(&self) -> Result<File> {
        self.log(TRACE)
    }

    fn log(&self, name: &str) -> Result<File> {
        let path = self.dir.join(name);
        File::create(&path)
            .map_err(|error| Failure::environment(format!("cannot write {}: {error}", path.display())))
    }

    /// Writes what was found. The files appear whole or not at all.
    pub fn write(&self, results: &Results) -> Result<()> {
        let json = serde_json::to_vec_pretty(results)
            .map_err(|error| Failure::environment(format!("cannot write results.json: {error}")))?;
        self.replace("results.json", &json)?;
        let xml = junit::report(results)
            .map_err(|error| Failure::environment(format!("cannot write junit.xml: {error}")))?;
        self.replace("junit.xml", xml.as_bytes())
    }

    fn replace(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.dir.join(name);
        let part = self.dir.join(format!(".{name}.{}", std::process::id()));
        let written = File::create(&part).and_then(|mut file| {
            file.write_all(bytes)?;
            file.write_all(b"\n")?;
            file.sync_all()?;
            fs::rename(&part, &path)
        });
        written.map_err(|error| {
            let _ = fs::remove_file(&part);
            Failure::environment(format!("cannot write {}: {error}", path.display()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::FailureKind;
    use crate::report::results::tests::sample;

    #[test]
    fn results_are_written_and_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("a/b");
        let out = OutDir::prepare(&inner).unwrap();
        out.write(&sample()).unwrap();
        let read: Results = serde_json::from_slice(&fs::read(inner.join("results.json")).unwrap()).unwrap();
        assert_eq!(read, sample());
        out.write(&sample()).unwrap();
        assert_eq!(fs::read_dir(&inner).unwrap().count(), 2);
        OutDir::prepare(&inner).unwrap();
        assert_eq!(fs::read_dir(&inner).unwrap().count(), 0);
    }

    #[test]
    fn what_is_no_folder_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(OutDir::prepare(file.path()).unwrap_err().kind, FailureKind::Usage);
        assert_eq!(OutDir::prepare(&file.path().join("x")).unwrap_err().kind, FailureKind::Usage);
        assert_eq!(OutDir::prepare(Path::new("/proc/nothing")).unwrap_err().kind, FailureKind::Usage);
    }
}
