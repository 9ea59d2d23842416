// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sizes, durations and paths as they stand on the command line.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A size in bytes: `512M`, `2G`, `1024MiB`. Units are powers of 1024 and must be given.
pub fn size(text: &str) -> Result<u64, String> {
    let (number, unit) = split(text);
    let shift = match unit.to_ascii_lowercase().as_str() {
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err("a size is a whole number and K, M, G or T, such as 512M or 2G".into()),
    };
    let number: u64 = number.parse().map_err(|_| "a size begins with a whole number, such as 512M or 2G")?;
    number.checked_shl(shift).filter(|bytes| bytes >> shift == number).ok_or_else(|| "too large".into())
}

/// A size of guest memory, within what a guest can be given.
pub fn memory(text: &str) -> Result<u64, String> {
    let bytes = size(text)?;
    if bytes < 256 << 20 {
        return Err("a guest needs 256M at least".into());
    }
    // An emulated processor has addresses of 40 bits, of which the device's windows need some.
    if bytes > 1 << 39 {
        return Err("at most 512G".into());
    }
    if bytes % (2 << 20) != 0 {
        return Err("must be a multiple of 2M".into());
    }
    Ok(bytes)
}

/// A size of a trace, within what one can have.
pub fn trace(text: &str) -> Result<u64, String> {
    let bytes = size(text)?;
    if bytes < 1 << 20 {
        return Err("a trace needs 1M at least".into());
    }
    if bytes > vgpu::oracle::MOST_BYTES {
        return Err("at most 16G".into());
    }
    Ok(bytes)
}

/// A duration: `500ms`, `30s`, `2m`, `1h30m`. Units must be given.
pub fn duration(text: &str) -> Result<Duration, String> {
    const WHAT: &str = "a duration is numbers with ms, s, m or h, such as 30s, 2m or 1h30m";
    let mut total = Duration::ZERO;
    let mut rest = text.trim();
    if rest.is_empty() {
        return Err(WHAT.into());
    }
    while !rest.is_empty() {
        let (number, tail) = split(rest);
        let end = tail.find(|c: char| c.is_ascii_digit()).unwrap_or(tail.len());
        let number: u64 = number.parse().map_err(|_| WHAT)?;
        let millis: u64 = match tail[..end].trim() {
            "ms" => 1,
            "s" => 1000,
            "m" | "min" => 60_000,
            "h" => 3_600_000,
            _ => return Err(WHAT.into()),
        };
        let part = number.checked_mul(millis).ok_or("too long")?;
        total = total.checked_add(Duration::from_millis(part)).ok_or("too long")?;
        rest = &tail[end..];
    }
    if total.is_zero() {
        return Err("must be more than nothing".into());
    }
    if total > Duration::from_secs(30 * 24 * 3600) {
        return Err("at most 30 days".into());
    }
    Ok(total)
}

/// `30s`, `1m30s`, `500ms`: what [`duration`] reads back.
#[must_use]
pub fn show_millis(millis: u64) -> String {
    let (minutes, rest) = (millis / 60_000, millis % 60_000);
    let mut text = String::new();
    if minutes > 0 {
        text.push_str(&format!("{minutes}m"));
    }
    if rest % 1000 != 0 {
        text.push_str(&format!("{rest}ms"));
    } else if rest > 0 || minutes == 0 {
        text.push_str(&format!("{}s", rest / 1000));
    }
    text
}

/// `512M`, `2G`: what [`size`] reads back.
#[must_use]
pub fn show_size(bytes: u64) -> String {
    for (shift, unit) in [(40, 'T'), (30, 'G'), (20, 'M')] {
        if bytes >= 1 << shift && bytes % (1 << shift) == 0 {
            return format!("{}{unit}", bytes >> shift);
        }
    }
    format!("{}K", bytes >> 10)
}

/// A file or folder of the host and where the guest finds it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Add {
    /// On the host.
    pub host: PathBuf,
    /// In the guest, absolute.
    pub guest: String,
}

/// `HOST[:GUEST]`; without GUEST the guest has it as `/add/NAME`.
pub fn add(text: &str) -> Result<Add, String> {
    let (host, guest) = crate::initramfs::parse_add(text).map_err(|failure| failure.to_string())?;
    if !guest.starts_with('/') {
        return Err("the place in the guest must be an absolute path".into());
    }
    if guest.split('/').any(|part| part == "..") {
        return Err("the place in the guest must not contain `..`".into());
    }
    let guest = format!(
        "/{}",
        guest.split('/').filter(|part| !matches!(*part, "" | ".")).collect::<Vec<_>>().join("/")
    );
    if guest == "/" || guest == "/init" || guest == "/testbench" || guest.starts_with("/testbench/") {
        return Err(format!("{guest} is the testbench's own in the guest"));
    }
    Ok(Add { host, guest })
}

fn split(text: &str) -> (&str, &str) {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    text.split_at(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(size("512M"), Ok(512 << 20));
        assert_eq!(size("2g"), Ok(2 << 30));
        assert_eq!(size("1024MiB"), Ok(1 << 30));
        for bad in ["", "M", "512", "1.5G", "-1G", "2X", "99999999999T", "18446744073709551616K"] {
            assert!(size(bad).is_err(), "{bad}");
        }
        assert!(memory("1M").is_err());
        assert!(memory("1T").is_err());
        assert_eq!(memory("512G"), Ok(512 << 30));
        assert!(memory("257M").is_err());
        assert_eq!(memory("258M"), Ok(258 << 20));
    }

    #[test]
    fn durations() {
        assert_eq!(duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(duration("1h30m"), Ok(Duration::from_secs(5400)));
        assert_eq!(duration("1500ms"), Ok(Duration::from_millis(1500)));
        for bad in ["", "30", "s", "1.5s", "-3s", "0s", "3 days", "1000h", "99999999999999999999s"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn shown_values_are_read_back() {
        for millis in [1, 999, 1000, 30_000, 60_000, 90_000, 90_500, 3_600_000] {
            assert_eq!(duration(&show_millis(millis)), Ok(Duration::from_millis(millis)), "{millis}");
        }
        for bytes in [512 << 20, 1 << 30, 258 << 20, 1 << 40] {
            assert_eq!(size(&show_size(bytes)), Ok(bytes));
        }
    }

    #[test]
    fn added_files() {
        assert_eq!(add("/a/b:/c//d/./e"), Ok(Add { host: "/a/b".into(), guest: "/c/d/e".into() }));
        assert_eq!(add("/etc/passwd"), Ok(Add { host: "/etc/passwd".into(), guest: "/add/passwd".into() }));
        for bad in ["", "/a:/../x", "/a:/init", "/a:/testbench/plan.json", "/a:/"] {
            assert!(add(bad).is_err(), "{bad}");
        }
    }
}
