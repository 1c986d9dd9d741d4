//! Restarts: what the writers make of the files that an earlier run left.

use super::{Log, Random, geometry};
use crate::gate::Shared;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use whimbrel_workload::cell::Broken;
use whimbrel_workload::params::Params;
use whimbrel_workload::replay::{BLOCK, Geometry, LOG_FILE, RANDOM_FILE, WORK_DIR};
use whimbrel_workload::report::Fault;

/// A folder of its own, gone with the test.
struct Run {
    dir: PathBuf,
    shared: Shared,
    geometry: Geometry,
}

impl Run {
    fn new(name: &str) -> Run {
        let dir = std::env::temp_dir().join(format!("wl-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a folder");
        let mut params = Params::idle();
        params.dir = dir.clone();
        params.log.max_mib = 1;
        params.random.file_mib = 1;
        params.random.sync_every = 8;
        let geometry = geometry(&params).expect("written");
        let shared = Shared::new(params);
        Run {
            dir,
            shared,
            geometry,
        }
    }

    fn log(&self) -> Log {
        Log::open(&self.dir, self.geometry, &self.shared).expect("opens")
    }

    fn random(&self) -> Random {
        Random::open(&self.dir, self.geometry, false, &self.shared).expect("opens")
    }

    fn file(&self, name: &str) -> File {
        let path = self.dir.join(WORK_DIR).join(name);
        File::options().write(true).open(path).expect("there")
    }

    /// Runs the random writer for `writes`.
    fn write_random(&self, writes: u64) {
        let mut random = self.random();
        for generation in 1..=writes {
            random.write(generation).expect("written");
        }
    }

    fn put(&self, block: u64, generation: u64) {
        let mut bytes = [0; BLOCK];
        let place = self.geometry.random_place(block);
        place.seal(generation, &mut bytes);
        let file = self.file(RANDOM_FILE);
        file.write_all_at(&bytes, block * BLOCK as u64)
            .expect("written");
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // What cannot be removed stays in the temporary folder.
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

#[test]
fn the_layout_of_the_first_run_stays() {
    let run = Run::new("layout");
    let mut params = run.shared.params.clone();
    params.seed = 99;
    params.random.file_mib = 3;
    assert_eq!(geometry(&params).expect("read"), run.geometry);
}

#[test]
fn the_log_goes_on_after_its_last_record_also_when_it_has_wrapped() {
    let run = Run::new("log-on");
    let mut log = run.log();
    for _ in 0..run.geometry.log_slots + 5 {
        log.append().expect("written");
    }
    assert_eq!(run.log().last_seq(), run.geometry.log_slots + 5);
    assert_eq!(run.shared.errors(), 0);
}

#[test]
fn a_torn_last_record_is_no_fault_and_a_torn_earlier_one_is() {
    let run = Run::new("log-torn");
    let mut log = run.log();
    for _ in 0..10 {
        log.append().expect("written");
    }
    let file = run.file(LOG_FILE);
    file.write_all_at(b"torn", 9 * 4096 + 100).expect("written");
    assert_eq!(run.log().last_seq(), 9);
    assert_eq!(run.shared.errors(), 0);
    file.write_all_at(b"torn", 4 * 4096 + 100).expect("written");
    run.log();
    let lost = Fault::LogLost {
        seq: 5,
        broken: Some(Broken::Checksum),
    };
    assert_eq!(run.shared.faults(), [lost]);
}

#[test]
fn writes_of_the_last_window_that_did_not_arrive_are_redone() {
    let run = Run::new("redo");
    run.write_random(100);
    // The one before the last never reached the disk: its block is as before it.
    let block = run.geometry.target(99);
    let before = run.geometry.random_generations(98)[block as usize];
    match before {
        0 => run
            .file(RANDOM_FILE)
            .write_all_at(&[0; BLOCK], block * BLOCK as u64)
            .expect("written"),
        before => run.put(block, before),
    }
    let mut random = run.random();
    assert_eq!(random.last_generation(), 100);
    let again = random.read(block).expect("read");
    assert_eq!(
        again,
        Ok(run.geometry.random_generations(100)[block as usize])
    );
    assert_eq!(run.shared.errors(), 0);
}

#[test]
fn an_older_write_that_is_lost_is_a_fault() {
    let run = Run::new("stale");
    run.write_random(1000);
    let last = run.geometry.random_generations(1000);
    let (block, expected) = (0u64..)
        .zip(last)
        .find(|&(_, g)| g > 300 && g < 900)
        .expect("256 blocks, a thousand writes");
    run.put(block, 1);
    run.random();
    let stale = Fault::RandomStale {
        block,
        expected,
        found: 1,
    };
    assert_eq!(run.shared.faults(), [stale]);
}
