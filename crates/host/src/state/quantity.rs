//! Sizes and rates as people write them: `512MiB`, `1.5GiB`, `80Mbit`.
//!
//! Sizes: `K M G T P` and `KiB MiB GiB TiB PiB` are powers of 1024 (as QEMU reads them), `kB MB GB TB PB`
//! are powers of 1000, a bare number is bytes. Rates: `kbit Mbit Gbit Tbit` are powers of 1000 in bits per
//! second, `kB/s ...` and `KiB/s ...` are bytes per second; a bare number is refused, since nobody can
//! know whether its writer meant bits or bytes. Upper and lower case count the same everywhere.
//! A fraction is cut to the whole byte or bit below.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::fmt;
use std::str::FromStr;

/// Why a size or a rate was not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    #[error("`{text}` is not a size: write a number and a unit, like 512MiB, 10GiB or 4096")]
    NotASize { text: String },
    #[error(
        "`{text}` is not a rate: write a number and a unit, like 500kbit, 80Mbit, 1Gbit or 10MiB/s"
    )]
    NotARate { text: String },
    #[error("`{text}` has no unit: write {text}bit or {text}B/s, or a larger unit such as Mbit")]
    RateWithoutUnit { text: String },
    #[error("a rate of nothing would never finish: write a rate above zero, or `unlimited`")]
    ZeroRate,
    #[error("`{text}` is larger than anything this program can count")]
    TooLarge { text: String },
}

/// A number of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(pub u64);

/// A rate in bits per second, never zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rate(u64);

/// A rate, or `unlimited`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct RateLimit(pub Option<Rate>);

const BINARY: [&str; 6] = ["", "Ki", "Mi", "Gi", "Ti", "Pi"];

impl ByteSize {
    pub const KIB: u64 = 1 << 10;
    pub const MIB: u64 = 1 << 20;
    pub const GIB: u64 = 1 << 30;

    pub fn bytes(self) -> u64 {
        self.0
    }

    /// For people: three digits or so, `1.5 GiB`. [`Display`](fmt::Display) is the exact form.
    pub fn approx(self) -> String {
        if self.0 < 1024 {
            return format!("{} B", self.0);
        }
        let (mut value, mut step) = (self.0 as f64, 0);
        // 1023.95 would print as 1024.0 of the smaller unit.
        while value >= 1023.95 && step + 1 < BINARY.len() {
            value /= 1024.0;
            step += 1;
        }
        format!("{value:.1} {}B", BINARY[step])
    }
}

impl fmt::Display for ByteSize {
    /// The largest unit that keeps the number whole, so that reading it back gives the same bytes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let step = if self.0 == 0 {
            0
        } else {
            (self.0.trailing_zeros() / 10).min(5) as usize
        };
        f.pad(&format!("{}{}B", self.0 >> (10 * step), BINARY[step]))
    }
}

impl FromStr for ByteSize {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Self, QuantityError> {
        let bad = || QuantityError::NotASize {
            text: text.to_string(),
        };
        let (number, unit) = split(text).ok_or_else(bad)?;
        let scale = byte_unit(&unit.to_ascii_lowercase()).ok_or_else(bad)?;
        Ok(ByteSize(number.times(scale, text)?))
    }
}

impl Rate {
    /// `None` for zero.
    pub fn from_bits_per_second(bits: u64) -> Option<Rate> {
        (bits > 0).then_some(Rate(bits))
    }

    pub fn bits_per_second(self) -> u64 {
        self.0
    }

    /// Whole bytes per second, at least one.
    pub fn bytes_per_second(self) -> u64 {
        (self.0 / 8).max(1)
    }

    /// For people: `79.6 Mbit/s`.
    pub fn approx(bits_per_second: u64) -> String {
        let (mut value, mut step) = (bits_per_second as f64, 0);
        let units = ["bit/s", "kbit/s", "Mbit/s", "Gbit/s", "Tbit/s"];
        while value >= 999.95 && step + 1 < units.len() {
            value /= 1000.0;
            step += 1;
        }
        if step == 0 {
            format!("{bits_per_second} bit/s")
        } else {
            format!("{value:.1} {}", units[step])
        }
    }
}

impl fmt::Display for Rate {
    /// Exact, in the largest unit that keeps the number whole.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = ["bit", "kbit", "Mbit", "Gbit", "Tbit"];
        let (mut value, mut step) = (self.0, 0);
        while value.is_multiple_of(1000) && step + 1 < units.len() {
            value /= 1000;
            step += 1;
        }
        f.pad(&format!("{value}{}", units[step]))
    }
}

impl FromStr for Rate {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Self, QuantityError> {
        let bad = || QuantityError::NotARate {
            text: text.to_string(),
        };
        let (number, unit) = split(text).ok_or_else(bad)?;
        let unit = unit.to_ascii_lowercase();
        if unit.is_empty() {
            return Err(QuantityError::RateWithoutUnit {
                text: text.trim().to_string(),
            });
        }
        let scale = match unit.strip_suffix("/s") {
            Some(per_second) if !per_second.contains("bit") => byte_unit(per_second)
                .filter(|_| per_second.ends_with('b'))
                .map(|s| s * 8),
            Some(bits) => bit_unit(bits),
            None => bit_unit(unit.strip_suffix("ps").unwrap_or(&unit)),
        };
        let bits = number.times(scale.ok_or_else(bad)?, text)?;
        Rate::from_bits_per_second(bits).ok_or(QuantityError::ZeroRate)
    }
}

impl fmt::Display for RateLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(rate) => rate.fmt(f),
            None => f.pad("unlimited"),
        }
    }
}

impl FromStr for RateLimit {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Self, QuantityError> {
        if text.trim().eq_ignore_ascii_case("unlimited") {
            return Ok(RateLimit(None));
        }
        Ok(RateLimit(Some(text.parse()?)))
    }
}

fn byte_unit(unit: &str) -> Option<u128> {
    let power = |base: u128, letter: &str| {
        let place = ["k", "m", "g", "t", "p"]
            .iter()
            .position(|l| *l == letter)?;
        Some(base.pow(place as u32 + 1))
    };
    match unit {
        "" | "b" => Some(1),
        _ => match unit.strip_suffix("ib") {
            Some(letter) => power(1024, letter),
            None => match unit.strip_suffix('b') {
                Some(letter) => power(1000, letter),
                None => power(1024, unit),
            },
        },
    }
}

fn bit_unit(unit: &str) -> Option<u128> {
    Some(match unit.strip_suffix("bit")? {
        "" => 1,
        "k" => 1_000,
        "m" => 1_000_000,
        "g" => 1_000_000_000,
        "t" => 1_000_000_000_000,
        _ => return None,
    })
}

/// A decimal number, kept exact: `digits / 10^places`.
struct Decimal {
    digits: u128,
    places: u32,
}

impl Decimal {
    fn times(&self, scale: u128, text: &str) -> Result<u64, QuantityError> {
        let too_large = || QuantityError::TooLarge {
            text: text.to_string(),
        };
        let product = self.digits.checked_mul(scale).ok_or_else(too_large)?;
        u64::try_from(product / 10u128.pow(self.places)).map_err(|_| too_large())
    }
}

/// Splits `1.5 GiB` into its number and its unit. At most 20 whole digits and 9 after the point: more
/// could overflow, and nobody means them.
fn split(text: &str) -> Option<(Decimal, &str)> {
    let text = text.trim();
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = (&text[..end], text[end..].trim_start());
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || whole.len() > 20 || fraction.len() > 9 || number.ends_with('.') {
        return None;
    }
    let digits = format!("{whole}{fraction}").parse().ok()?;
    Some((
        Decimal {
            digits,
            places: fraction.len() as u32,
        },
        unit,
    ))
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    /// A text such as `"512MiB"`, or a whole number of bytes.
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = ByteSize;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size such as \"512MiB\"")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<ByteSize, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<ByteSize, E> {
                Ok(ByteSize(bytes))
            }

            fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<ByteSize, E> {
                u64::try_from(bytes)
                    .map(ByteSize)
                    .map_err(|_| E::invalid_value(de::Unexpected::Signed(bytes), &self))
            }
        }
        d.deserialize_any(Visitor)
    }
}

impl Serialize for RateLimit {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for RateLimit {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = RateLimit;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a rate such as \"80Mbit\", or \"unlimited\"")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<RateLimit, E> {
                text.parse().map_err(E::custom)
            }
        }
        d.deserialize_str(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn size(text: &str) -> u64 {
        text.parse::<ByteSize>().unwrap().0
    }

    fn rate(text: &str) -> u64 {
        text.parse::<Rate>().unwrap().bits_per_second()
    }

    #[test]
    fn sizes_people_write() {
        assert_eq!(size("4096"), 4096);
        assert_eq!(size("512MiB"), 512 << 20);
        assert_eq!(size("512 mib"), 512 << 20);
        assert_eq!(size("1.5G"), 3 << 29);
        assert_eq!(size("2GB"), 2_000_000_000);
        assert_eq!(size("1.3GiB"), 1_395_864_371);
    }

    #[test]
    fn rates_people_write() {
        assert_eq!(rate("80Mbit"), 80_000_000);
        assert_eq!(rate("80 mbit/s"), 80_000_000);
        assert_eq!(
            rate("2.5Gbps".replace("bps", "bitps").as_str()),
            2_500_000_000
        );
        assert_eq!(rate("10MiB/s"), 83_886_080);
        assert_eq!(rate("1MB/s"), 8_000_000);
        assert_eq!("unlimited".parse(), Ok(RateLimit(None)));
    }

    #[test]
    fn what_is_not_a_size_is_refused_in_words() {
        for text in [
            "",
            "MiB",
            "-5",
            "12 parsecs",
            "1.GiB",
            ".5G",
            "1.2.3G",
            "0x10",
        ] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
        assert!(matches!(
            "99999999P".parse::<ByteSize>(),
            Err(QuantityError::TooLarge { .. })
        ));
    }

    #[test]
    fn what_is_not_a_rate_is_refused_in_words() {
        assert!(matches!(
            "80".parse::<Rate>(),
            Err(QuantityError::RateWithoutUnit { .. })
        ));
        assert!(matches!(
            "0Mbit".parse::<Rate>(),
            Err(QuantityError::ZeroRate)
        ));
        for text in ["80M", "80MB", "fast", "80Mibit", "80M/s"] {
            assert!(
                matches!(text.parse::<Rate>(), Err(QuantityError::NotARate { .. })),
                "{text}"
            );
        }
    }

    proptest! {
        #[test]
        fn every_size_reads_back_as_written(bytes: u64) {
            prop_assert_eq!(size(&ByteSize(bytes).to_string()), bytes);
        }

        #[test]
        fn every_rate_reads_back_as_written(bits in 1u64..) {
            let rate = Rate::from_bits_per_second(bits).unwrap();
            prop_assert_eq!(rate.to_string().parse::<Rate>().unwrap(), rate);
        }

        #[test]
        fn no_text_makes_the_parsers_panic(text in "\\PC{0,40}") {
            let _ = text.parse::<ByteSize>();
            let _ = text.parse::<RateLimit>();
        }

        #[test]
        fn whole_sizes_in_any_unit_are_exact(n in 0u64..1000, unit in 0usize..6) {
            let text = format!("{n}{}B", BINARY[unit]);
            prop_assert_eq!(size(&text), n << (10 * unit));
        }
    }
}
