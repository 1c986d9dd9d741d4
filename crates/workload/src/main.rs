//! The program inside the laboratory's guests.
//!
//! As process 1 it is the whole of the guest's user space: it mounts what is needed, loads the modules,
//! takes its parameters from the kernel's command line, runs the workloads as threads, and powers the
//! machine off when told to. Started otherwise it takes the same words as arguments, works in the folder
//! `wl.dir`, and exits instead of powering off.

mod ballast;
mod boot;
mod control;
mod disk;
mod gate;
mod net;
mod ram;
mod reader;
mod stream;

use disk::{Log, Random};
use gate::Shared;
use net::Reporter;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;
use std::time::Duration;
use whimbrel_workload::Error;
use whimbrel_workload::params::Params;
use whimbrel_workload::report::{Fault, Line, Operation, Outcome, Start, Workload};

fn main() -> ExitCode {
    let process_one = std::process::id() == 1;
    let outcome = if process_one {
        as_process_one()
    } else {
        let words: Vec<String> = std::env::args().skip(1).collect();
        Params::parse(&words.join(" ")).and_then(|params| work(params, Place::Folder))
    };
    if let Err(error) = &outcome {
        let message = error.to_string();
        println!("{}", Line::Fatal { message }.to_json());
    }
    if process_one {
        let error = boot::power_off();
        println!("cannot power off: {error}");
    }
    match outcome {
        Ok(0) => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

fn as_process_one() -> Result<u64, Error> {
    boot::mount_kernel()?;
    let params = Params::parse(&boot::cmdline()?)?;
    boot::load_modules()?;
    boot::network(&params)?;
    let place = if boot::mount_disk(&params)? {
        Place::Disk
    } else {
        Place::Nowhere
    };
    work(params, place)
}

/// Where the disk workloads work.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// In a guest without a disk: they do not.
    Nowhere,
    /// On the guest's mounted disk.
    Disk,
    /// In a folder of a system that is not this program's.
    Folder,
}

/// Runs until `poweroff`; the number of faults.
fn work(params: Params, place: Place) -> Result<u64, Error> {
    let echo = net::echo_socket(&params)?;
    let listener = control::listen(&params)?;
    let stream = stream::listen(&params)?;
    let reporter = Arc::new(Reporter::new(&params).map_err(|source| Error::Listen {
        port: params.client_port,
        source,
    })?);
    let shared = Arc::new(Shared::new(params));
    let mut start = Start {
        uptime_s: boot::uptime(),
        params: shared.params.clone(),
        recovered_seq: 0,
        recovered_generation: 0,
    };

    let ram = spawn(&shared, Some(Workload::Ram), |shared| ram::run(&shared));
    let mut workers = Vec::new();
    if place == Place::Nowhere {
        for workload in [Workload::Log, Workload::Random, Workload::Read] {
            shared.stage(workload).park();
        }
    } else {
        let (log, random) = open_disk(&shared)?;
        if let Some(log) = log {
            start.recovered_seq = log.last_seq();
            let reporter = Arc::clone(&reporter);
            workers.push(spawn(&shared, Some(Workload::Log), move |shared| {
                disk::run_log(log, &shared, &reporter)
            }));
        }
        if let Some(random) = random {
            start.recovered_generation = random.last_generation();
            let reporter = Arc::clone(&reporter);
            workers.push(spawn(&shared, Some(Workload::Random), move |shared| {
                disk::run_random(random, &shared, &reporter)
            }));
        }
        workers.push(spawn(&shared, Some(Workload::Read), move |shared| {
            reader::run(&shared, place == Place::Disk)
        }));
    }
    let started = Line::Start(start);
    println!("{}", started.to_json());
    reporter.send(&shared, &started);

    let (ask, asked) = sync_channel(1);
    {
        let reporter = Arc::clone(&reporter);
        workers.push(spawn(&shared, None, move |shared| reporter.run(&shared)));
    }
    workers.push(spawn(&shared, None, |shared| net::run_tick(&shared)));
    // These are not waited for: they sit in the kernel until the process ends.
    spawn(&shared, None, move |shared| net::run_echo(&echo, &shared));
    if let Some(listener) = stream {
        spawn(&shared, None, move |shared| stream::run(&listener, &shared));
    }
    {
        let reporter = Arc::clone(&reporter);
        spawn(&shared, None, move |shared| {
            control::run(&listener, &shared, &reporter, &ask)
        });
    }

    let poweroff = asked.recv().ok();
    shared.stopping.store(true, Relaxed);
    for worker in workers {
        // A worker that died has said so itself.
        let _ = worker.join();
    }
    let outcome = finish(&shared, ram, place);
    let line = Line::Result(outcome.clone());
    println!("{}", line.to_json());
    reporter.send(&shared, &line);
    let errors = outcome.errors;
    if let Some(poweroff) = poweroff
        && poweroff.reply.send(outcome).is_ok()
        && poweroff
            .replied
            .recv_timeout(Duration::from_secs(3))
            .is_ok()
    {
        // Written is not yet delivered; the network goes with the machine.
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(errors)
}

/// The disk writers that have any use. One whose file does not open is a fault, not the end.
fn open_disk(shared: &Shared) -> Result<(Option<Log>, Option<Random>), Error> {
    let dir = &shared.params.dir;
    let geometry = disk::geometry(&shared.params)?;
    let report = |workload, error: std::io::Error| {
        shared.io_fault(workload, Operation::Open, &error);
        shared.stage(workload).park();
    };
    let log = Log::open(dir, geometry, shared)
        .map_err(|error| report(Workload::Log, error))
        .ok();
    let random = Random::open(dir, geometry, shared.params.random.direct, shared)
        .map_err(|error| report(Workload::Random, error))
        .ok();
    Ok((log, random))
}

/// The final check of all pages, and the disk off.
fn finish(shared: &Shared, ram: JoinHandle<ram::RamSet>, place: Place) -> Outcome {
    let mut checked = 0;
    if let Ok(set) = ram.join() {
        for page in 0..set.len() {
            if let Err(fault) = set.check(page) {
                shared.fault(fault);
            }
            checked += 1;
        }
    }
    let unmounted = match place {
        Place::Nowhere => true,
        Place::Folder => false,
        Place::Disk => match boot::unmount_disk(&shared.params) {
            Ok(()) => true,
            Err(error) => {
                shared.io_fault(Workload::Log, Operation::Unmount, &error);
                false
            }
        },
    };
    let ack = shared.ack();
    Outcome {
        errors: shared.errors(),
        ram_pages_checked: checked,
        last_fsynced_seq: ack.seq,
        last_fsynced_generation: ack.generation,
        unmounted,
        totals: shared.totals(),
        faults: shared.faults(),
    }
}

/// A thread that, should it panic, leaves a fault behind instead of silence.
fn spawn<T: Send + 'static>(
    shared: &Arc<Shared>,
    workload: Option<Workload>,
    run: impl FnOnce(Arc<Shared>) -> T + Send + 'static,
) -> JoinHandle<T> {
    struct LastWords(Arc<Shared>, Option<Workload>);
    impl Drop for LastWords {
        fn drop(&mut self) {
            if std::thread::panicking()
                && let Some(workload) = self.1
            {
                self.0.stage(workload).park();
                self.0.fault(Fault::Died { workload });
            }
        }
    }
    let words = LastWords(Arc::clone(shared), workload);
    std::thread::spawn(move || {
        let words = words;
        run(Arc::clone(&words.0))
    })
}
