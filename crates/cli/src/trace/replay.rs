//! `whimbrel trace replay`: a trace's requests against an NBD export, timed.
//!
//! One task gives the orders at their times, another takes the answers; a semaphore of the queue's depth is between them.
//! A request that finds the queue full waits, and goes out late: lateness is measured apart from latency, which
//! counts from when the order is given. With both one sees what an export that is too slow does to a guest that does not
//! wait for it; latency alone would hide that.

use super::args::{Replay, Speed};
use super::{of, open};
use crate::error::CliError;
use crate::output;
use crate::show::bytes;
use serde::Serialize;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;
use whimbrel_engine::latency::Latencies;
use whimbrel_host::api::{ApiError, ErrorCode};
use whimbrel_host::volumes::drive::{self, Answers, LONGEST, LONGEST_PLAIN, Offer, Order, Orders};
use whimbrel_host::volumes::nbd::NbdError;
use whimbrel_volume::trace::format::Reader;
use whimbrel_volume::trace::{Kind, Record, TraceError};

/// An export that answers none of what it was asked for so long is given up.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a replay came to.
#[derive(Serialize)]
struct Report {
    speed: String,
    queue: u32,
    took_s: f64,
    requests: u64,
    requests_per_s: f64,
    errors: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    first_error: Option<FirstError>,
    kinds: BTreeMap<&'static str, KindReport>,
    /// How much later than at its time each went out; absent at full speed.
    #[serde(skip_serializing_if = "Option::is_none")]
    lateness: Option<Spread>,
    /// Requests of kinds that the export does not take.
    left_out: u64,
    /// Requests that the recording lost.
    not_in_trace: u64,
}

#[derive(Serialize)]
struct KindReport {
    requests: u64,
    bytes: u64,
    errors: u64,
    latency: Spread,
}

/// Microseconds; p50 and p99 to within 19 %.
#[derive(Clone, Copy, Serialize)]
struct Spread {
    p50_us: u64,
    p99_us: u64,
    max_us: u64,
}

#[derive(Clone, Serialize)]
struct FirstError {
    kind: &'static str,
    offset: u64,
    len: u64,
    errno: u32,
}

#[derive(Default)]
struct Measured {
    latencies: Latencies,
    max_us: u64,
}

impl Measured {
    fn take(&mut self, time: Duration) {
        let us = time.as_micros().min(u128::from(u64::MAX)) as u64;
        self.latencies.record(us);
        self.max_us = self.max_us.max(us);
    }

    fn spread(&self) -> Spread {
        // A bucket's end may lie beyond the longest in it.
        let at = |part| self.latencies.quantile(part).unwrap_or(0).min(self.max_us);
        Spread {
            p50_us: at(0.5),
            p99_us: at(0.99),
            max_us: self.max_us,
        }
    }
}

#[derive(Default)]
struct OfKind {
    bytes: u64,
    errors: u64,
    measured: Measured,
}

struct Flight {
    kind: Kind,
    offset: u64,
    len: u64,
    given: Instant,
}

/// What both tasks write into; they are of one thread.
#[derive(Default)]
struct Books {
    flights: HashMap<u64, Flight>,
    kinds: BTreeMap<Kind, OfKind>,
    first_error: Option<FirstError>,
}

/// What the trace is, before anything is done.
#[derive(Default)]
struct Look {
    reach: u64,
    changes: u64,
}

pub fn replay(command: &Replay, json: bool) -> Result<(), CliError> {
    let look = look(command)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(CliError::Runtime)?;
    let report = runtime.block_on(run(command, &look))?;
    if json {
        output::print_json(&report);
    } else {
        output::print(&text(&report));
    }
    match report.errors {
        0 => Ok(()),
        errors => Err(CliError::ReplayErrors {
            errors,
            requests: report.requests,
        }),
    }
}

fn records(command: &Replay) -> Result<impl Iterator<Item = Result<Record, TraceError>>, CliError> {
    let path = &command.file;
    let mut reader = Reader::new(open(path)?).map_err(of(path))?;
    Ok(std::iter::from_fn(move || reader.next_record().transpose()))
}

fn look(command: &Replay) -> Result<Look, CliError> {
    let mut look = Look::default();
    for record in records(command)? {
        let record = record.map_err(of(&command.file))?;
        if record.kind.has_place() {
            look.reach = look.reach.max(record.offset + record.len);
        }
        look.changes += u64::from(record.kind.changes());
    }
    Ok(look)
}

fn refused(what: String, next: impl Into<String>) -> CliError {
    ApiError::new(ErrorCode::Invalid, what)
        .machine_state("nothing was done to the export")
        .next_step(next)
        .into()
}

fn broke(error: NbdError) -> CliError {
    let next = match &error {
        NbdError::NoExport { .. } => "list the server's exports with `nbdinfo --list`",
        _ => "see that the server runs and lets this host in",
    };
    ApiError::new(ErrorCode::Io, error.to_string())
        .machine_state("what was done to the export until then stays")
        .next_step(next)
        .into()
}

fn check(command: &Replay, look: &Look, offer: Offer) -> Result<(), CliError> {
    if look.reach > offer.size {
        return Err(refused(
            format!(
                "the trace reaches to byte {}, the export has {}",
                look.reach, offer.size
            ),
            "take an export at least as large as the disk that was recorded",
        ));
    }
    if look.changes == 0 {
        return Ok(());
    }
    if !offer.takes(Order::Write) {
        return Err(refused(
            "the export is read-only, and the trace has writes".to_string(),
            "have it served to read and write",
        ));
    }
    if !command.yes {
        return Err(refused(
            format!(
                "the trace has {} writes, zeroes and discards: the export's content would be lost",
                look.changes
            ),
            "say --yes if that is meant",
        ));
    }
    Ok(())
}

async fn run(command: &Replay, look: &Look) -> Result<Report, CliError> {
    let (offer, orders, answers) = drive::open(&command.to).await.map_err(broke)?;
    if let Err(refusal) = check(command, look, offer) {
        orders.close().await;
        return Err(refusal);
    }
    let room = Semaphore::new(command.queue as usize);
    let books = RefCell::new(Books::default());
    let mut giving = Giving {
        command,
        offer,
        orders,
        room: &room,
        books: &books,
        begun: Instant::now(),
        lateness: Measured::default(),
        cookie: 0,
        writes: 0,
        content: Vec::new(),
        left_out: 0,
        not_in_trace: 0,
    };
    tokio::select! {
        given = giving.all() => given?,
        error = take_answers(answers, &books, &room) => return Err(broke(error)),
    }
    let took_s = giving.begun.elapsed().as_secs_f64();
    let (lateness, left_out, not_in_trace) = (
        giving.lateness.spread(),
        giving.left_out,
        giving.not_in_trace,
    );
    giving.orders.close().await;
    let books = books.into_inner();
    let kinds: BTreeMap<_, _> = books
        .kinds
        .iter()
        .map(|(kind, of)| {
            let report = KindReport {
                requests: of.measured.latencies.len(),
                bytes: of.bytes,
                errors: of.errors,
                latency: of.measured.spread(),
            };
            (kind.name(), report)
        })
        .collect();
    let requests = kinds.values().map(|kind| kind.requests).sum();
    Ok(Report {
        speed: command.speed.to_string(),
        queue: command.queue,
        took_s,
        requests,
        requests_per_s: requests as f64 / took_s.max(1e-9),
        errors: kinds.values().map(|kind| kind.errors).sum(),
        first_error: books.first_error,
        kinds,
        lateness: (command.speed != Speed::Max).then_some(lateness),
        left_out,
        not_in_trace,
    })
}

/// The half that gives the orders.
struct Giving<'r> {
    command: &'r Replay,
    offer: Offer,
    orders: Orders,
    room: &'r Semaphore,
    books: &'r RefCell<Books>,
    begun: Instant,
    lateness: Measured,
    cookie: u64,
    /// Writes given.
    writes: u64,
    content: Vec<u8>,
    left_out: u64,
    not_in_trace: u64,
}

impl Giving<'_> {
    async fn all(&mut self) -> Result<(), CliError> {
        for record in records(self.command)? {
            let record = record.map_err(of(&self.command.file))?;
            self.one(record).await?;
        }
        // All is answered when the queue is empty.
        for _ in 0..self.command.queue {
            self.take_room().await?;
        }
        Ok(())
    }

    async fn one(&mut self, record: Record) -> Result<(), CliError> {
        let order = match record.kind {
            Kind::Read => Order::Read,
            Kind::Write => Order::Write,
            // An export that takes no zeroes as such takes them as content.
            Kind::Zero if self.offer.takes(Order::Zero) => Order::Zero,
            Kind::Zero => Order::Write,
            Kind::Trim => Order::Trim,
            Kind::Flush => Order::Flush,
            Kind::Gap => {
                self.not_in_trace += record.len;
                return Ok(());
            }
        };
        if !self.offer.takes(order) {
            self.left_out += 1;
            return Ok(());
        }
        let due = match self.command.speed {
            Speed::Max => None,
            Speed::Times(n) => {
                Some(self.begun + Duration::from_secs_f64(record.at_us as f64 / 1e6 / n))
            }
        };
        if let Some(due) = due {
            tokio::time::sleep_until(due.into()).await;
        }
        let longest = match order {
            Order::Read | Order::Write => LONGEST,
            Order::Trim | Order::Zero | Order::Flush => LONGEST_PLAIN,
        };
        let end = record.offset + record.len;
        let mut at = record.offset;
        loop {
            let len = (end - at).min(longest);
            self.take_room().await?;
            let given = Instant::now();
            if let Some(due) = due {
                self.lateness.take(given.saturating_duration_since(due));
            }
            self.give(order, record.kind, at, len, given).await?;
            at += len;
            if at >= end {
                return Ok(());
            }
        }
    }

    async fn give(
        &mut self,
        order: Order,
        kind: Kind,
        offset: u64,
        len: u64,
        given: Instant,
    ) -> Result<(), CliError> {
        self.content.clear();
        if order == Order::Write {
            self.content.resize(len as usize, 0);
            if kind == Kind::Write {
                fill(&mut self.content, offset, self.writes);
                self.writes += 1;
            }
        }
        self.cookie += 1;
        let flight = Flight {
            kind,
            offset,
            len,
            given,
        };
        self.books.borrow_mut().flights.insert(self.cookie, flight);
        let (cookie, len) = (self.cookie, len as u32);
        let given = self.orders.give(order, cookie, offset, len, &self.content);
        given.await.map_err(broke)
    }

    /// Waits for room in the queue; the answer gives it back.
    async fn take_room(&self) -> Result<(), CliError> {
        match tokio::time::timeout(PATIENCE, self.room.acquire()).await {
            Ok(room) => {
                room.expect("the semaphore is never closed").forget();
                Ok(())
            }
            Err(_) => Err(ApiError::new(
                ErrorCode::Io,
                format!(
                    "the export answered none of {} requests for {} s",
                    self.books.borrow().flights.len(),
                    PATIENCE.as_secs()
                ),
            )
            .machine_state("what was done to the export until then stays")
            .next_step("look into the server's log")
            .into()),
        }
    }
}

/// Ends with the connection only.
async fn take_answers(mut answers: Answers, books: &RefCell<Books>, room: &Semaphore) -> NbdError {
    loop {
        let content_of = |cookie| {
            let flight = &books.borrow().flights;
            let flight = flight.get(&cookie)?;
            Some(match flight.kind {
                Kind::Read => flight.len as u32,
                _ => 0,
            })
        };
        let (cookie, errno) = match answers.next(content_of).await {
            Ok(answer) => answer,
            Err(error) => return error,
        };
        let mut books = books.borrow_mut();
        if let Some(flight) = books.flights.remove(&cookie) {
            let of = books.kinds.entry(flight.kind).or_default();
            of.measured.take(flight.given.elapsed());
            if errno == 0 {
                of.bytes += flight.len;
            } else {
                of.errors += 1;
                books.first_error.get_or_insert(FirstError {
                    kind: flight.kind.name(),
                    offset: flight.offset,
                    len: flight.len,
                    errno,
                });
            }
        }
        room.add_permits(1);
    }
}

/// What write `number` of a replay writes at `offset`: the same each time, and different from what any other write puts
/// there.
fn fill(content: &mut [u8], offset: u64, number: u64) {
    for (at, word) in (offset..).step_by(8).zip(content.chunks_mut(8)) {
        // SplitMix64's mixing of the place and the number.
        let mut x = at ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^= x >> 31;
        word.copy_from_slice(&x.to_le_bytes()[..word.len()]);
    }
}

fn text(report: &Report) -> String {
    let ms = |us: u64| format!("{:.2} ms", us as f64 / 1e3);
    let rows: Vec<_> = report
        .kinds
        .iter()
        .map(|(kind, of)| {
            [
                kind.to_string(),
                of.requests.to_string(),
                bytes(of.bytes),
                ms(of.latency.p50_us),
                ms(of.latency.p99_us),
                ms(of.latency.max_us),
                of.errors.to_string(),
            ]
        })
        .collect();
    let mut lines = vec![
        output::table(
            [
                "KIND", "REQUESTS", "BYTES", "P50", "P99", "LONGEST", "ERRORS",
            ],
            &rows,
        ),
        format!(
            "\n{} requests in {:.1} s, {:.0} a second; speed {}, at most {} at a time",
            report.requests, report.took_s, report.requests_per_s, report.speed, report.queue
        ),
    ];
    if let Some(late) = &report.lateness {
        lines.push(format!(
            "late: p50 {}, p99 {}, longest {}",
            ms(late.p50_us),
            ms(late.p99_us),
            ms(late.max_us)
        ));
    }
    if report.left_out > 0 {
        lines.push(format!(
            "{} left out: the export takes no such requests",
            report.left_out
        ));
    }
    if report.not_in_trace > 0 {
        lines.push(format!(
            "{} requests are not in the trace: the recording lost them",
            report.not_in_trace
        ));
    }
    if let Some(error) = &report.first_error {
        lines.push(format!(
            "the first error: {} of {} bytes at {}, number {}",
            error.kind, error.len, error.offset, error.errno
        ));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_write_the_same_again_and_no_two_the_same() {
        let content = |offset, number| {
            let mut content = vec![0; 4100];
            fill(&mut content, offset, number);
            content
        };
        assert_eq!(content(4096, 7), content(4096, 7));
        assert_ne!(content(4096, 7), content(4096, 8));
        assert_ne!(content(4096, 7)[..512], content(8192, 7)[..512]);
        assert!(content(0, 1)[4096..].iter().any(|&byte| byte != 0));
    }
}
