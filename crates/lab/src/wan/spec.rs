//! What a link is to be like.

use std::time::Duration;

use crate::LabError;

/// Longest one-way delay, jitter or time queue accepted. Keeps all sums of nanoseconds far from 2^64.
const TIME_BOUND: Duration = Duration::from_secs(60);

/// Fastest rate accepted, in bits per second.
const RATE_BOUND: u64 = 100_000_000_000;

/// How long the queue in front of a direction may get; what comes when it is full is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    /// Bytes of IP packets.
    Bytes(u64),
    /// As many bytes as the rate carries in this time.
    Time(Duration),
}

/// One direction of the link.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LineSpec {
    /// Bits per second, counted over whole IP packets (headers of IP and TCP included, nothing below
    /// them); `None`: no limit, and so no queue.
    pub rate: Option<u64>,
    /// One way.
    pub delay: Duration,
    /// Each packet is delayed by a further time, uniform in `0..=jitter`; the order is kept.
    pub jitter: Duration,
    /// Probability that a packet is lost, each on its own.
    pub loss: f64,
    pub queue: Queue,
}

impl LineSpec {
    /// A clean line with a queue of 50 ms.
    pub fn new(rate: u64, delay: Duration) -> Self {
        LineSpec {
            rate: Some(rate),
            delay,
            jitter: Duration::ZERO,
            loss: 0.0,
            queue: Queue::Time(Duration::from_millis(50)),
        }
    }

    /// A cable that only delays.
    pub fn unlimited(delay: Duration) -> Self {
        LineSpec {
            rate: None,
            ..LineSpec::new(1, delay)
        }
    }

    pub fn with_loss(self, loss: f64) -> Self {
        LineSpec { loss, ..self }
    }

    pub fn with_jitter(self, jitter: Duration) -> Self {
        LineSpec { jitter, ..self }
    }

    pub fn with_queue(self, queue: Queue) -> Self {
        LineSpec { queue, ..self }
    }

    /// Refuses what no line can be.
    pub fn validate(&self) -> Result<(), LabError> {
        let refuse = |field, value, wanted| {
            Err(LabError::LinkSpec {
                field,
                value,
                wanted,
            })
        };
        if let Some(rate) = self.rate
            && !(1..=RATE_BOUND).contains(&rate)
        {
            return refuse("rate", format!("{rate} bit/s"), "1 bit/s to 100 Gbit/s");
        }
        for (field, time) in [("delay", self.delay), ("jitter", self.jitter)] {
            if time > TIME_BOUND {
                return refuse(field, format!("{time:?}"), "at most 60 s");
            }
        }
        if let Queue::Time(time) = self.queue
            && time > TIME_BOUND
        {
            return refuse("queue", format!("{time:?}"), "at most 60 s");
        }
        if !(0.0..=1.0).contains(&self.loss) {
            return refuse("loss", self.loss.to_string(), "a probability");
        }
        Ok(())
    }
}

/// Both directions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WanSpec {
    pub a_to_b: LineSpec,
    pub b_to_a: LineSpec,
    /// Decides which packets are lost and how they are jittered.
    pub seed: u64,
}

impl WanSpec {
    /// The same line both ways: a round trip is twice its delay.
    pub fn symmetric(line: LineSpec) -> Self {
        WanSpec {
            a_to_b: line,
            b_to_a: line,
            seed: 1,
        }
    }

    pub fn validate(&self) -> Result<(), LabError> {
        self.a_to_b.validate()?;
        self.b_to_a.validate()
    }
}
