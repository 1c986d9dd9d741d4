//! Limits by the time of day: `[[schedule]]` of the configuration.
//!
//! ```toml
//! bandwidth = "800Mbit"              # at all other times
//!
//! [[schedule]]
//! days      = ["mon", "tue", "wed", "thu", "fri"]   # every day if left out
//! from      = "08:00"
//! to        = "18:30"                # the next morning, if it is earlier than `from`
//! bandwidth = "100Mbit"
//! ```
//!
//! Times are the host's local ones. Of several entries that fit the first counts. The day of an entry that
//! goes past midnight is the one it begins on. What the operator says with `throttle` is a migration's own
//! limit, under the host's one: both hold.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use whimbrel_peer::pace::Pace;

use crate::daemon::rate_of;
use crate::state::RateLimit;

/// How often the clock is looked at; a limit is late by no more than this.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Minutes of a day.
const DAY: u16 = 24 * 60;

/// A day of the week.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Day {
    Mon,
    Tue,
    Wed,
    Thu,
    Fri,
    Sat,
    Sun,
}

impl Day {
    const ALL: [Day; 7] = [
        Day::Mon,
        Day::Tue,
        Day::Wed,
        Day::Thu,
        Day::Fri,
        Day::Sat,
        Day::Sun,
    ];

    fn before(self) -> Day {
        Day::ALL[(self as usize + 6) % 7]
    }
}

/// A time of day, to the minute: `08:30`; `24:00` is the end of the day.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TimeOfDay(u16);

/// A text that is no time of day.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no time of day: write hours and minutes, like 08:30")]
pub struct NotATime {
    pub text: String,
}

impl FromStr for TimeOfDay {
    type Err = NotATime;

    fn from_str(text: &str) -> Result<TimeOfDay, NotATime> {
        let number = |digits: &str, most: u16| {
            let two = digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_digit());
            let number = two.then(|| digits.parse::<u16>().ok()).flatten();
            number.filter(|&n| n <= most)
        };
        let minutes = text
            .split_once(':')
            .and_then(|(hours, minutes)| Some(number(hours, 24)? * 60 + number(minutes, 59)?));
        minutes
            .filter(|&m| m <= DAY)
            .map(TimeOfDay)
            .ok_or_else(|| NotATime {
                text: text.chars().take(40).collect(),
            })
    }
}

impl fmt::Display for TimeOfDay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02}:{:02}", self.0 / 60, self.0 % 60)
    }
}

impl Serialize for TimeOfDay {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for TimeOfDay {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        text.parse().map_err(de::Error::custom)
    }
}

/// A limit for a part of some days.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Empty: every day.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub days: Vec<Day>,
    pub from: TimeOfDay,
    pub to: TimeOfDay,
    pub bandwidth: RateLimit,
}

impl Entry {
    fn holds(&self, day: Day, minute: u16) -> bool {
        let on = |day| self.days.is_empty() || self.days.contains(&day);
        let (from, to) = (self.from.0, self.to.0);
        if from < to {
            on(day) && (from..to).contains(&minute)
        } else {
            // Past midnight; of two equal times, for a whole day.
            (on(day) && minute >= from) || (on(day.before()) && minute < to)
        }
    }
}

/// What holds on `day` at `minute` of it, in local time.
pub fn limit_at(schedule: &[Entry], otherwise: RateLimit, day: Day, minute: u16) -> RateLimit {
    let entry = schedule.iter().find(|entry| entry.holds(day, minute));
    entry.map_or(otherwise, |entry| entry.bandwidth)
}

/// What holds now.
pub fn limit_now(schedule: &[Entry], otherwise: RateLimit) -> RateLimit {
    let now = jiff::Zoned::now();
    let day = Day::ALL[now.weekday().to_monday_zero_offset() as usize % 7];
    let minute = now.hour() as u16 * 60 + now.minute() as u16;
    limit_at(schedule, otherwise, day, minute)
}

/// Keeps the host's pace to the schedule, for ever.
pub async fn keep(schedule: Vec<Entry>, otherwise: RateLimit, pace: Pace) {
    let mut limit = None;
    loop {
        let now = limit_now(&schedule, otherwise);
        if limit.replace(now) != Some(now) {
            tracing::info!(bandwidth = %now, "the schedule's limit for all migrations holds");
            pace.set_rate(rate_of(now));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(days: &[Day], from: &str, to: &str, bandwidth: &str) -> Entry {
        Entry {
            days: days.to_vec(),
            from: from.parse().expect("a time"),
            to: to.parse().expect("a time"),
            bandwidth: bandwidth.parse().expect("a rate"),
        }
    }

    fn at(schedule: &[Entry], day: Day, time: &str) -> String {
        let minute = time.parse::<TimeOfDay>().expect("a time").0;
        limit_at(schedule, RateLimit(None), day, minute).to_string()
    }

    #[test]
    fn office_hours_end_on_the_minute_and_skip_the_weekend() {
        let week = [Day::Mon, Day::Tue, Day::Wed, Day::Thu, Day::Fri];
        let schedule = [entry(&week, "08:00", "18:30", "100Mbit")];
        assert_eq!(at(&schedule, Day::Mon, "07:59"), "unlimited");
        assert_eq!(at(&schedule, Day::Mon, "08:00"), "100Mbit");
        assert_eq!(at(&schedule, Day::Fri, "18:29"), "100Mbit");
        assert_eq!(at(&schedule, Day::Fri, "18:30"), "unlimited");
        assert_eq!(at(&schedule, Day::Sat, "12:00"), "unlimited");
    }

    #[test]
    fn a_night_belongs_to_the_day_it_begins_on() {
        let schedule = [entry(&[Day::Sun], "22:00", "06:00", "1Gbit")];
        assert_eq!(at(&schedule, Day::Sun, "05:00"), "unlimited");
        assert_eq!(at(&schedule, Day::Sun, "23:00"), "1Gbit");
        assert_eq!(at(&schedule, Day::Mon, "05:59"), "1Gbit");
        assert_eq!(at(&schedule, Day::Mon, "06:00"), "unlimited");
    }

    #[test]
    fn the_first_entry_that_fits_counts() {
        let schedule = [
            entry(&[], "12:00", "13:00", "50Mbit"),
            entry(&[], "00:00", "24:00", "200Mbit"),
        ];
        assert_eq!(at(&schedule, Day::Wed, "12:30"), "50Mbit");
        assert_eq!(at(&schedule, Day::Wed, "13:00"), "200Mbit");
        assert_eq!(at(&schedule, Day::Wed, "23:59"), "200Mbit");
    }

    #[test]
    fn what_is_no_time_of_day_is_refused() {
        for text in ["8:00", "24:01", "12:60", "noon", "", "12:5", "+1:00"] {
            assert!(text.parse::<TimeOfDay>().is_err(), "{text}");
        }
    }
}
