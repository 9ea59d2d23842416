// SPDX-License-Identifier: MIT OR Apache-2.0
//! The cache folder: items that are either complete or absent.
//!
//! An item is a directory. It is made under a name of its own in `partial/`, by the holder of its lock in `locks/`, gets a
//! manifest last, and is renamed into `items/`. So an interrupted maker leaves at most a partial directory (removed by its
//! guard, or by the next maker, since its lock is free), and two makers at once wait for each other.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::event::{Event, EventSink};
use crate::failure::{Failure, Result};
use crate::process::{self, Guard};

const MANIFEST: &str = "manifest.json";
const FILE_LIST: &str = "files.txt";
/// After how long waiting for somebody else's work is worth a word.
const WAIT_NOTE: Duration = Duration::from_secs(2);

/// Where provisioned things are kept.
#[derive(Clone, Debug)]
pub struct Cache {
    root: PathBuf,
}

/// What an item is; stored in it, and last, so that its presence means completeness.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Manifest {
    /// The item's name.
    pub item: String,
    /// What it was made by; a different recipe makes it anew.
    pub recipe: String,
    /// Seconds since 1970.
    pub made: u64,
    /// Versions of what is in it, by package or part.
    pub versions: BTreeMap<String, String>,
    /// Files without which it is of no use, with their sizes, checked at each use.
    pub key_files: BTreeMap<String, u64>,
}

/// What a maker says about what it made.
#[derive(Debug, Default)]
pub struct Made {
    /// See [`Manifest::versions`].
    pub versions: BTreeMap<String, String>,
    /// Paths inside the item, for [`Manifest::key_files`].
    pub key_files: Vec<String>,
}

/// What is to be made.
#[derive(Debug)]
pub struct Wanted<'a> {
    /// Name of the item, a plain file name.
    pub item: &'a str,
    /// Name of the step in events.
    pub step: &'a str,
    /// What the step does, for people.
    pub about: &'a str,
    /// See [`Manifest::recipe`].
    pub recipe: &'a str,
    /// Free space that making it takes.
    pub bytes: u64,
}

/// A complete item.
#[derive(Clone, Debug)]
pub struct Item {
    /// Where it is.
    pub path: PathBuf,
    /// What it is.
    pub manifest: Manifest,
}

/// The place where an item is being made; gives the maker its guard for child processes.
#[derive(Debug)]
pub struct Partial {
    /// The directory; empty at first.
    pub path: PathBuf,
    /// Kills the maker's processes and removes the directory if we are killed.
    pub guard: Guard,
}

impl Cache {
    /// `$HMM_TESTBENCH_CACHE`, else `hmm-testbench` in `$XDG_CACHE_HOME`, else in `~/.cache`.
    ///
    /// # Errors
    /// When none of these is set.
    pub fn from_env() -> Result<Self> {
        let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let root = set("HMM_TESTBENCH_CACHE")
            // The XDG rules say that a relative path is to be ignored.
            .or_else(|| set("XDG_CACHE_HOME").filter(|p| p.is_absolute()).map(|p| p.join("hmm-testbench")))
            .or_else(|| set("HOME").map(|p| p.join(".cache/hmm-testbench")))
            .ok_or_else(|| {
                Failure::environment("no cache folder: neither HOME nor XDG_CACHE_HOME is set")
                    .remedy("set HMM_TESTBENCH_CACHE to a folder with 3 GB of space")
            })?;
        Self::at(root)
    }

    /// A cache in this folder, which is made when first needed.
    ///
    /// # Errors
    /// When the working directory is gone and the path is relative.
    pub fn at(root: impl Into<PathBuf>) -> Result<Self> {
        let root = std::path::absolute(root.into())
            .map_err(|error| Failure::environment(format!("cannot tell the working directory: {error}")))?;
        Ok(Self { root })
    }

    /// Its folder.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// An item if it is there and complete.
    #[must_use]
    pub fn get(&self, item: &str, recipe: &str) -> Option<Item> {
        match self.look(item, recipe) {
            State::Complete(item) => Some(item),
            State::Absent | State::Broken(_) => None,
        }
    }

    /// Free bytes for us on the cache's disk.
    ///
    /// # Errors
    /// When the disk cannot be asked.
    pub fn free_bytes(&self) -> Result<u64> {
        let there = self.root.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("/"));
        let disk = nix::sys::statvfs::statvfs(there).map_err(|error| {
            Failure::environment(format!("cannot ask the disk of {}: {error}", there.display()))
        })?;
        Ok(disk.blocks_available().saturating_mul(disk.fragment_size()))
    }

    /// An error on a path of this cache, as a failure; a full disk and a forbidden folder get their own words.
    pub(crate) fn trouble(&self, doing: &str, error: &io::Error) -> Failure {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => self.disk_full(doing),
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                Failure::environment(format!("{doing}: {error} (cache folder {})", self.root.display()))
                    .remedy("make it writable, or set HMM_TESTBENCH_CACHE to another folder")
            }
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
                Failure::environment(format!("{doing}: {error} (cache folder {})", self.root.display()))
                    .remedy("set HMM_TESTBENCH_CACHE to a folder that can be made")
            }
            _ => Failure::environment(format!("{doing}: {error} (cache folder {})", self.root.display())),
        }
    }

    /// The disk filled up in the middle of something.
    pub(crate) fn disk_full(&self, doing: &str) -> Failure {
        Failure::environment(format!(
            "{doing}: no space left on the disk of the cache folder {}",
            self.root.display()
        ))
        .remedy("free some space there, or set HMM_TESTBENCH_CACHE to a folder on another disk")
    }

    /// Returns an item, making it first if it is absent, broken or of another recipe.
    ///
    /// # Errors
    /// The maker's, or those of the disk.
    pub fn ensure(
        &self,
        wanted: &Wanted<'_>,
        events: &Arc<dyn EventSink>,
        make: &mut dyn FnMut(&mut Partial) -> Result<Made>,
    ) -> Result<Item> {
        if let State::Complete(item) = self.look(wanted.item, wanted.recipe) {
            // The date is that of the last use, for `prune`; where it cannot be set, the item only seems older.
            let _ = File::options()
                .append(true)
                .open(item.path.join(MANIFEST))
                .and_then(|file| file.set_modified(SystemTime::now()));
            return Ok(item);
        }
        let start = Instant::now();
        events.event(Event::StepStart { step: wanted.step.into(), about: wanted.about.into(), total: None });
        let result = self.make(wanted, events, make);
        events.event(Event::StepEnd {
            step: wanted.step.into(),
            seconds: start.elapsed().as_secs_f64(),
            cached: matches!(&result, Ok((_, false))),
            ok: result.is_ok(),
        });
        result.map(|(item, _)| item)
    }

    fn make(
        &self,
        wanted: &Wanted<'_>,
        events: &Arc<dyn EventSink>,
        make: &mut dyn FnMut(&mut Partial) -> Result<Made>,
    ) -> Result<(Item, bool)> {
        for dir in ["items", "partial", "locks"] {
            let dir = self.root.join(dir);
            fs::create_dir_all(&dir)
                .map_err(|e| self.trouble(&format!("cannot make {}", dir.display()), &e))?;
        }
        let _lock = self.lock(wanted.item, events)?;
        match self.look(wanted.item, wanted.recipe) {
            State::Complete(item) => return Ok((item, false)), // somebody else made it while we waited
            State::Absent => {}
            State::Broken(why) => events.event(Event::Note {
                text: format!("{} in the cache is of no use ({why}) and is made again", wanted.item),
            }),
        }
        self.sweep(wanted.item);
        let free = self.free_bytes()?;
        if free < wanted.bytes {
            return Err(self.disk_full(&format!(
                "{} needs about {} MB of disk, {} MB are free",
                wanted.item,
                wanted.bytes.div_ceil(1_000_000),
                free / 1_000_000
            )));
        }
        let path = self.partial_path(wanted.item);
        let guard =
            Guard::new(&[&path]).map_err(|e| Failure::environment(format!("cannot start /bin/sh: {e}")))?;
        fs::create_dir(&path).map_err(|e| self.trouble(&format!("cannot make {}", path.display()), &e))?;
        let mut partial = Partial { path, guard };
        let result = make(&mut partial).and_then(|made| self.publish(wanted, &partial.path, made));
        if result.is_err() {
            let _ = fs::remove_dir_all(&partial.path);
        }
        result.map(|item| (item, true))
    }

    /// Describes what was made and moves it to its place.
    fn publish(&self, wanted: &Wanted<'_>, partial: &Path, made: Made) -> Result<Item> {
        let doing = format!("finishing {}", wanted.item);
        let trouble = |error: &io::Error| self.trouble(&doing, error);
        let mut key_files = BTreeMap::new();
        for file in made.key_files {
            let bytes = fs::metadata(partial.join(&file))
                .map_err(|e| Failure::environment(format!("{} came out without {file}: {e}", wanted.item)))?;
            key_files.insert(file, bytes.len());
        }
        let mut list = String::new();
        walk(partial, &mut |file, meta| {
            if meta.is_file() {
                list.push_str(&format!("{} {}\n", meta.len(), file.display()));
            }
        })
        .map_err(|e| trouble(&e))?;
        fs::write(partial.join(FILE_LIST), &list).map_err(|e| trouble(&e))?;
        key_files.insert(FILE_LIST.into(), list.len() as u64);
        let manifest = Manifest {
            item: wanted.item.into(),
            recipe: wanted.recipe.into(),
            made: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            versions: made.versions,
            key_files,
        };
        let text = serde_json::to_string_pretty(&manifest)
            .map_err(|e| Failure::environment(format!("{doing}: cannot write its manifest: {e}")))?;
        fs::write(partial.join(MANIFEST), text).map_err(|e| trouble(&e))?;
        let path = self.item_path(wanted.item);
        if path.symlink_metadata().is_ok() {
            // Out of the way first: a rename cannot replace a directory that is not empty.
            let old = self.partial_path(wanted.item);
            fs::rename(&path, &old).map_err(|e| trouble(&e))?;
            let _ = fs::remove_dir_all(&old);
        }
        fs::rename(partial, &path).map_err(|e| trouble(&e))?;
        Ok(Item { path, manifest })
    }

    /// Compares every file of an item with the list made when it was complete; for use before long work that relies on it.
    /// Says what is wrong.
    #[must_use]
    pub fn damage(item: &Item) -> Option<String> {
        let list = match fs::read_to_string(item.path.join(FILE_LIST)) {
            Ok(list) => list,
            Err(error) => return Some(format!("{FILE_LIST}: {error}")),
        };
        for line in list.lines() {
            let Some((bytes, file)) = line.split_once(' ') else {
                return Some(format!("{FILE_LIST} is malformed"));
            };
            match fs::symlink_metadata(item.path.join(file)) {
                Ok(meta) if meta.len().to_string() == bytes => {}
                Ok(meta) => return Some(format!("{file} has {} bytes instead of {bytes}", meta.len())),
                Err(error) => return Some(format!("{file}: {error}")),
            }
        }
        None
    }

    /// Removes those of the items whose names begin with `prefix` that were not used for longest, so that `keep` stay. An item
    /// that somebody is making is left alone.
    pub fn prune(&self, prefix: &str, keep: usize) {
        let Ok(entries) = fs::read_dir(self.root.join("items")) else { return };
        let mut items: Vec<(SystemTime, String)> = entries
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok().filter(|name| name.starts_with(prefix))?;
                let used = fs::metadata(entry.path().join(MANIFEST)).and_then(|meta| meta.modified());
                Some((used.unwrap_or(UNIX_EPOCH), name))
            })
            .collect();
        items.sort();
        for (_, name) in items.iter().take(items.len().saturating_sub(keep)) {
            let Ok(lock) = File::open(self.lock_path(name)) else { continue };
            if process::try_lock(&lock).unwrap_or(false) {
                // Away at once, then slowly: whoever looks meanwhile finds it absent, not half there.
                let gone = self.partial_path(name);
                if fs::rename(self.item_path(name), &gone).is_ok() {
                    let _ = fs::remove_dir_all(&gone);
                }
            }
        }
    }

    /// Forgets an item, so that it is made again.
    pub fn discard(&self, item: &Item) {
        let _ = fs::remove_file(item.path.join(MANIFEST));
    }

    fn look(&self, item: &str, recipe: &str) -> State {
        let path = self.item_path(item);
        let text = match fs::read_to_string(path.join(MANIFEST)) {
            Ok(text) => text,
            Err(_) if path.symlink_metadata().is_err() => return State::Absent,
            Err(error) => return State::Broken(format!("its manifest: {error}")),
        };
        let manifest: Manifest = match serde_json::from_str(&text) {
            Ok(manifest) => manifest,
            Err(error) => return State::Broken(format!("its manifest: {error}")),
        };
        if manifest.recipe != recipe {
            return State::Broken("it was made by another version of the testbench".into());
        }
        for (file, bytes) in &manifest.key_files {
            match fs::metadata(path.join(file)) {
                Ok(meta) if meta.len() == *bytes => {}
                Ok(meta) => {
                    return State::Broken(format!("{file} has {} bytes instead of {bytes}", meta.len()));
                }
                Err(error) => return State::Broken(format!("{file}: {error}")),
            }
        }
        State::Complete(Item { path, manifest })
    }

    /// Waits for the item's lock, which is held until the file is dropped or we die.
    fn lock(&self, item: &str, events: &Arc<dyn EventSink>) -> Result<File> {
        let path = self.lock_path(item);
        let open = || fs::OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let file = open().map_err(|e| self.trouble(&format!("cannot open {}", path.display()), &e))?;
        let start = Instant::now();
        let mut said = false;
        loop {
            if process::try_lock(&file)
                .map_err(|e| self.trouble(&format!("cannot lock {}", path.display()), &e))?
            {
                return Ok(file);
            }
            if !said && start.elapsed() >= WAIT_NOTE {
                said = true;
                events.event(Event::Note {
                    text: format!("waiting for another testbench that is making {item}"),
                });
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Removes what dead makers left: the partial directories of this item, whose lock we hold, and of each other item
    /// whose lock is free.
    fn sweep(&self, ours: &str) {
        let Ok(entries) = fs::read_dir(self.root.join("partial")) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let Some((item, _)) = name.to_str().and_then(|name| name.rsplit_once('@')) else { continue };
            let dead = item == ours
                || File::open(self.lock_path(item)).is_ok_and(|lock| {
                    // The lock is ours until the end of this closure; a maker that comes in between waits for it, and
                    // has no directory yet.
                    let free = process::try_lock(&lock).unwrap_or(false);
                    if free {
                        let _ = fs::remove_dir_all(entry.path());
                    }
                    free
                });
            if dead {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }

    fn item_path(&self, item: &str) -> PathBuf {
        self.root.join("items").join(item)
    }

    fn lock_path(&self, item: &str) -> PathBuf {
        self.root.join("locks").join(format!("{item}.lock"))
    }

    /// A name that nobody else uses: item, process, count.
    fn partial_path(&self, item: &str) -> PathBuf {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        self.root.join("partial").join(format!("{item}@{}-{count}", std::process::id()))
    }
}

enum State {
    Complete(Item),
    Absent,
    Broken(String),
}

/// Visits everything below a directory, with paths relative to it, in a fixed order. Symbolic links are not followed.
pub(crate) fn walk(root: &Path, visit: &mut dyn FnMut(&Path, &fs::Metadata)) -> io::Result<()> {
    let mut pending = vec![root.to_owned()];
    while let Some(dir) = pending.pop() {
        let mut entries = fs::read_dir(&dir)?.collect::<io::Result<Vec<_>>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let meta = entry.metadata()?;
            let path = entry.path();
            visit(path.strip_prefix(root).unwrap_or(&path), &meta);
            if meta.is_dir() {
                pending.push(path);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make(cache: &Cache, name: &str) -> Item {
        let events: Arc<dyn EventSink> = Arc::new(|_| {});
        let wanted = Wanted { item: name, step: "s", about: "a", recipe: "r", bytes: 1 };
        cache.ensure(&wanted, &events, &mut |_| Ok(Made::default())).unwrap()
    }

    #[test]
    fn what_was_used_last_stays() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path()).unwrap();
        let hour = Duration::from_secs(3600);
        for (age, name) in [(3, "module-a"), (2, "module-b"), (1, "module-c"), (9, "other")] {
            let item = make(&cache, name);
            let manifest = File::options().append(true).open(item.path.join(MANIFEST)).unwrap();
            manifest.set_modified(SystemTime::now() - age * hour).unwrap();
        }
        make(&cache, "module-a"); // used now
        cache.prune("module-", 2);
        let there = |name: &str| cache.get(name, "r").is_some();
        assert!(there("module-a") && !there("module-b") && there("module-c") && there("other"));
        let _busy = cache.lock("module-a", &(Arc::new(|_| {}) as Arc<dyn EventSink>)).unwrap();
        cache.prune("module-", 0);
        assert!(there("module-a") && !there("module-c"));
        assert_eq!(fs::read_dir(dir.path().join("partial")).unwrap().count(), 0);
    }
}
