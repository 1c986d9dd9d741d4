//! The link as it is given on the command line.

use clap::Args;
use std::time::Duration;
use whimbrel_lab::net::LabSpec;
use whimbrel_lab::wan::{LineSpec, WanSpec};

/// The wide area between the hosts
#[derive(Clone, Debug, Args)]
pub struct LinkArgs {
    /// Bits per second each way: 100Mbit, 1Gbit, 500kbit
    #[arg(long, value_name = "RATE", default_value = "100Mbit", value_parser = rate)]
    pub link: u64,
    /// Round trip: 40ms, 0.3s
    #[arg(long, value_name = "TIME", default_value = "40ms", value_parser = time)]
    pub rtt: Duration,
    /// Share of packets lost each way: 0.01, or 1%
    #[arg(long, value_name = "SHARE", default_value = "0", value_parser = share)]
    pub loss: f64,
    /// Decides which packets are lost
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
}

impl LinkArgs {
    pub fn lab(&self) -> LabSpec {
        let line = LineSpec::new(self.link, self.rtt / 2).with_loss(self.loss);
        LabSpec::new(WanSpec {
            seed: self.seed,
            ..WanSpec::symmetric(line)
        })
    }

    /// For people: `100 Mbit/s, 40 ms round trip, no loss`.
    pub fn describe(&self) -> String {
        let loss = match self.loss {
            0.0 => "no loss".to_owned(),
            share => format!("{} % loss", share * 100.0),
        };
        let ms = self.rtt.as_secs_f64() * 1e3;
        format!(
            "{} Mbit/s, {ms} ms round trip, {loss}",
            self.link as f64 / 1e6
        )
    }

    /// How long so many bytes take at least.
    pub fn time_for(&self, bytes: u64) -> Duration {
        Duration::from_secs_f64(bytes as f64 * 8.0 / self.link as f64)
    }
}

/// A number and its unit; the first unit that fits counts.
fn quantity(text: &str, units: &[(&str, f64)]) -> Option<f64> {
    let (unit, factor) = units.iter().find(|(unit, _)| text.ends_with(unit))?;
    let number: f64 = text.strip_suffix(unit)?.trim().parse().ok()?;
    (number.is_finite() && number >= 0.0).then_some(number * factor)
}

fn rate(text: &str) -> Result<u64, String> {
    let units = [("kbit", 1e3), ("Mbit", 1e6), ("Gbit", 1e9)];
    match quantity(text, &units) {
        Some(rate) if rate >= 1e3 => Ok(rate as u64),
        _ => Err("a rate is a number with kbit, Mbit or Gbit, 1kbit at least".to_owned()),
    }
}

fn time(text: &str) -> Result<Duration, String> {
    match quantity(text, &[("ms", 1e-3), ("s", 1.0)]) {
        Some(seconds) if seconds <= 60.0 => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("a time is a number with ms or s, 60s at most".to_owned()),
    }
}

fn share(text: &str) -> Result<f64, String> {
    match quantity(text, &[("%", 1e-2), ("", 1.0)]) {
        Some(share) if share <= 1.0 => Ok(share),
        _ => Err("a share is a number up to 1, or with %".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_understood_as_people_write_them() {
        assert_eq!(rate("100Mbit"), Ok(100_000_000));
        assert_eq!(rate("1.5Gbit"), Ok(1_500_000_000));
        assert_eq!(time("40ms"), Ok(Duration::from_millis(40)));
        assert_eq!(time("0.3s"), Ok(Duration::from_millis(300)));
        assert_eq!((share("1%"), share("0.5")), (Ok(0.01), Ok(0.5)));
        for bad in ["", "100", "Mbit", "-1Mbit", "0Mbit", "infMbit"] {
            assert!(rate(bad).is_err(), "{bad}");
        }
        assert!(time("40").is_err() && time("61s").is_err());
        assert!(share("101%").is_err() && share("x").is_err());
    }
}
