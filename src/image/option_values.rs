//! Values of options as text, read as QEMU reads them: switches, numbers,
//! sizes. It knows no option.

use crate::error::{Error, Result};

/// The error for a value that is none. `wanted` says what would be one.
#[cold]
pub(crate) fn bad_value(name: &str, value: &str, wanted: &str) -> Error {
    Error::invalid(format!("option {name:?} cannot be {value:?}: {wanted}"))
}

/// A switch: on, yes, true, y, or off, no, false, n.
pub(crate) fn switch(name: &str, value: &str) -> Result<bool> {
    match value {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => Err(bad_value(name, value, "it is on or off")),
    }
}

/// A whole number, decimal or (0x) hexadecimal, of at most `max`.
pub(crate) fn number(name: &str, value: &str, max: u64) -> Result<u64> {
    let parsed = match hexadecimal(value) {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => all_digits(value).then(|| value.parse().ok()).flatten(),
    };
    parsed
        .filter(|number| *number <= max)
        .ok_or_else(|| bad_value(name, value, &format!("it is a whole number, at most {max}")))
}

/// A number of bytes: 65536, 0x10000, 64K, 1.5G. The suffixes are B, K, M, G,
/// T, P and E, of either case, in powers of 1024.
pub(crate) fn size(name: &str, value: &str) -> Result<u64> {
    parse_size(value).ok_or_else(|| {
        bad_value(name, value, "it is a number of bytes, maybe with a suffix (K, M, G, T, P, E)")
    })
}

fn parse_size(value: &str) -> Option<u64> {
    if let Some(digits) = hexadecimal(value) {
        return u64::from_str_radix(digits, 16).ok();
    }
    let (number, shift) = match value.char_indices().last()? {
        (at, suffix) if !suffix.is_ascii_digit() && suffix != '.' => (&value[..at], shift(suffix)?),
        _ => (value, 0),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() || !all_digits(whole) || !all_digits(fraction) {
        return None;
    }
    let whole = if whole.is_empty() { 0 } else { whole.parse::<u64>().ok()? };
    let fraction = scaled_fraction(fraction, shift)?;
    u64::try_from((u128::from(whole) << shift) + fraction).ok()
}

/// The decimals of a number, times 2^shift, rounded to the nearest.
fn scaled_fraction(decimals: &str, shift: u32) -> Option<u128> {
    let decimals = decimals.trim_end_matches('0');
    if decimals.is_empty() {
        return Some(0);
    }
    // There is no part of a byte.
    if shift == 0 {
        return None;
    }
    // More decimals than these move no byte even of an exbibyte.
    let decimals = &decimals[..decimals.len().min(19)];
    let unit = 10u128.pow(decimals.len() as u32);
    // Below 10^19 * 2^60, which is less than 2^124.
    let scaled = decimals.parse::<u128>().ok()? << shift;
    Some((scaled + unit / 2) / unit)
}

fn shift(suffix: char) -> Option<u32> {
    match suffix.to_ascii_uppercase() {
        'B' => Some(0),
        'K' => Some(10),
        'M' => Some(20),
        'G' => Some(30),
        'T' => Some(40),
        'P' => Some(50),
        'E' => Some(60),
        _ => None,
    }
}

/// What follows 0x, if that is how the value begins. No sign gets through.
fn hexadecimal(value: &str) -> Option<&str> {
    let digits = value.strip_prefix("0x").or_else(|| value.strip_prefix("0X"))?;
    digits.bytes().all(|byte| byte.is_ascii_hexdigit()).then_some(digits)
}

fn all_digits(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_those_of_qemu() {
        let good = [
            ("0", 0),
            ("65536", 65536),
            ("0x10000", 65536),
            ("0XfF", 255),
            ("1B", 1),
            ("1b", 1),
            ("64K", 65536),
            ("64k", 65536),
            ("1.5M", 1_572_864),
            (".5K", 512),
            ("1.K", 1024),
            ("12.000", 12),
            ("1.1k", 1126),
            ("8E", 8 << 60),
            ("15.9E", 18_331_451_923_248_866_918),
            ("1.0000000000000000000000000000001E", 1 << 60),
            ("18446744073709551615", u64::MAX),
        ];
        for (text, bytes) in good {
            assert_eq!(size("s", text).unwrap(), bytes, "{text}");
        }
        let bad = [
            "",
            "K",
            ".",
            ".K",
            "-1",
            "+1",
            " 1",
            "1 ",
            "1KK",
            "64KiB",
            "64KB",
            "1.5",
            "1.5B",
            "0x",
            "0xg",
            "0x1K",
            "1e3",
            "16E",
            "18446744073709551616",
            "1.2.3K",
            "1,5K",
            "\u{661}",
            "1\u{212a}",
            "0x+1",
            "nan",
        ];
        for text in bad {
            assert!(size("s", text).is_err(), "{text}");
        }
    }

    #[test]
    fn switches_and_numbers() {
        assert!(switch("s", "on").unwrap() && switch("s", "yes").unwrap());
        assert!(!switch("s", "off").unwrap() && !switch("s", "n").unwrap());
        for text in ["", "1", "ON", "onn"] {
            assert!(switch("s", text).is_err(), "{text}");
        }
        assert_eq!(number("n", "600", 600).unwrap(), 600);
        assert_eq!(number("n", "0x20", 600).unwrap(), 32);
        for text in ["", "601", "-1", "+1", "1K", "1.0", "0x"] {
            assert!(number("n", text, 600).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn whole_sizes_come_back(value: u64) {
            prop_assert_eq!(size("s", &value.to_string()).unwrap(), value);
            prop_assert_eq!(size("s", &format!("{value:#x}")).unwrap(), value);
            let kib = value >> 10;
            prop_assert_eq!(size("s", &format!("{kib}K")).unwrap(), kib << 10);
        }

        #[test]
        fn no_text_is_too_much(text: String) {
            let _ = size("s", &text);
            let _ = number("n", &text, u64::MAX);
        }
    }
}
