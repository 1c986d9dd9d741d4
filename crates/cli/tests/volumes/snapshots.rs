//! Snapshots of a machine through the command: a real daemon and a QEMU without a guest, whose disks `qemu-io`
//! writes to. What comes back is compared with images that the same was done to.

use super::{Daemon, err, tool, wait_until};
use serde_json::Value;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

const MIB: u64 = 1 << 20;

/// A machine of two disks that runs, and images that are to be as they are.
struct Bench {
    d: Daemon,
}

impl Bench {
    fn start() -> Bench {
        let d = Daemon::start();
        for disk in ["root", "data"] {
            d.ok(&["volume", "create", disk, "--size", "64MiB"]);
            tool(
                "qemu-img",
                &["create", "-q", "-f", "raw", &d.path(disk), "64M"],
            );
        }
        let text = "name = \"web\"\nmemory = \"64MiB\"\naccel = \"tcg\"\n\
                    [[disk]]\nvolume = \"root\"\n[[disk]]\nvolume = \"data\"\n";
        std::fs::write(d.path("web.toml"), text).unwrap();
        d.ok(&["machine", "define", &d.path("web.toml")]);
        d.ok(&["machine", "start", "web"]);
        Bench { d }
    }

    /// Does it to a disk of the machine, by the machine's own export, and to the image.
    fn both(&self, disk: &str, deeds: &[&str]) {
        let socket = self.d.state().join("machines/web/nbd.sock");
        let uri = format!("nbd+unix:///{disk}?socket={}", socket.display());
        for place in [uri.as_str(), &self.d.path(disk)] {
            let mut args = vec!["-f", "raw", "-d", "unmap", "-t", "writeback"];
            for deed in deeds {
                args.extend(["-c", *deed]);
            }
            args.push(place);
            tool("qemu-io", &args);
        }
    }

    fn json(&self, args: &[&str]) -> Value {
        let text = self.d.ok(&[args, &["--json"]].concat());
        serde_json::from_str(&text).unwrap()
    }

    fn create(&self, name: &str) -> Value {
        self.json(&["snapshot", "create", "web", "--to", "repo", "--name", name])
    }

    /// What was looked at of each disk, and whether there was a reason to look at all.
    fn looked_at(made: &Value) -> Vec<(u64, bool)> {
        let volumes = made["volumes"].as_array().unwrap().iter();
        volumes
            .map(|v| {
                let looked_at = v["looked_at"].as_u64().unwrap();
                (looked_at / 1024, v["whole_because"].is_string())
            })
            .collect()
    }

    /// Keeps the images as they are now.
    fn keep(&self, name: &str) {
        for disk in ["root", "data"] {
            let copy = self.d.path(&format!("{disk}-{name}"));
            std::fs::copy(self.d.path(disk), copy).unwrap();
        }
    }

    fn restores(&self, name: &str) {
        for disk in ["root", "data"] {
            let file = format!("./back-{disk}-{name}");
            self.d.ok(&[
                "snapshot", "restore", "repo", name, "--volume", disk, "--to", &file,
            ]);
            let kept = self.d.path(&format!("{disk}-{name}"));
            let args = ["compare", "-q", "-f", "raw", "-F", "raw"];
            tool(
                "qemu-img",
                &[&args[..], &[&self.d.path(&file), &kept]].concat(),
            );
            std::fs::remove_file(self.d.path(&file)).unwrap();
        }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = self.d.ask(&["machine", "stop", "web", "--force"]);
    }
}

/// Ends the daemon as its service manager does, and starts another.
fn restart(d: &mut Daemon) {
    let pid = d.child.id().to_string();
    assert!(Command::new("kill").arg(&pid).status().unwrap().success());
    d.child.wait().unwrap();
    d.child = super::run_daemon(&d.state());
}

#[test]
fn snapshots_are_made_of_what_changed_and_come_back_as_they_were() {
    let mut bench = Bench::start();
    bench.both("root", &["write -P 1 0 5M", "write -P 2 40M 300k"]);
    bench.both("data", &["write -P 3 63M 1M"]);
    let one = bench.create("one");
    assert_eq!(Bench::looked_at(&one), [(65536, true), (65536, true)]);
    bench.keep("one");

    // Over two extents, away, and to zero.
    bench.both(
        "root",
        &[
            "write -P 4 1023k 2k",
            "discard 40M 256k",
            "write -z 2M 256k",
        ],
    );
    let two = bench.create("two");
    assert_eq!(Bench::looked_at(&two), [(4 * 256, false), (0, false)]);
    assert_eq!(two["parent"], "one");
    assert!(two["stored_bytes"].as_u64().unwrap() < MIB);
    bench.keep("two");
    bench.restores("one");
    bench.restores("two");

    // A daemon that ends in good order knows what changed, one that dies does not; both are right.
    bench.both("data", &["write -P 5 0 1k"]);
    restart(&mut bench.d);
    bench.both("data", &["write -P 6 10M 1k"]);
    let three = bench.create("three");
    assert_eq!(Bench::looked_at(&three), [(0, false), (2 * 256, false)]);
    bench.keep("three");
    bench.both("root", &["write -P 7 20M 1k"]);
    bench.d.crash();
    let four = bench.create("four");
    assert_eq!(Bench::looked_at(&four), [(65536, true), (65536, true)]);
    assert!(four["stored_bytes"].as_u64().unwrap() < MIB, "{four}");
    bench.keep("four");
    bench.restores("three");
    bench.restores("four");

    // Stopped, it has snapshots as well, and nothing changed since; unless somebody else was there.
    bench.d.ok(&["machine", "stop", "web", "--force"]);
    let five = bench.create("five");
    assert_eq!(Bench::looked_at(&five), [(0, false), (0, false)]);
    assert_eq!(five["consistency"], "stopped");
    let args = ["-f", "raw", "-c", "write -P 8 30M 4k"];
    tool("qemu-io", &[&args[..], &[&bench.d.data("root")]].concat());
    tool("qemu-io", &[&args[..], &[&bench.d.path("root")]].concat());
    let six = bench.create("six");
    assert_eq!(Bench::looked_at(&six), [(65536, true), (0, false)]);
    bench.keep("six");
    bench.restores("six");

    let listed = bench.json(&["snapshot", "ls", "repo"]);
    let names: Vec<_> = listed["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| &s["name"])
        .collect();
    assert_eq!(names, ["one", "two", "three", "four", "five", "six"]);
    let shown = bench.d.ok(&["snapshot", "show", "repo", "two"]);
    assert!(shown.contains("changes of:  one"), "{shown}");
    for gone in ["one", "two", "three", "four"] {
        bench.d.ok(&["snapshot", "rm", "repo", gone]);
    }
    assert!(
        bench
            .d
            .ok(&["snapshot", "verify", "repo"])
            .contains("nothing is damaged")
    );
    bench.restores("six");

    // As a volume that a machine can start from.
    bench.d.ok(&[
        "snapshot",
        "restore",
        "repo",
        "six",
        "--volume",
        "root",
        "--to",
        "root-again",
    ]);
    let (data, kept) = (bench.d.data("root-again"), bench.d.path("root-six"));
    tool(
        "qemu-img",
        &["compare", "-q", "-f", "raw", "-F", "raw", &data, &kept],
    );
}

#[test]
fn what_cannot_be_is_refused_with_the_reason() {
    let bench = Bench::start();
    let d = &bench.d;
    bench.both("root", &["write -P 1 0 1M", "write -P 2 8M 1M"]);
    std::fs::create_dir(d.path("letters")).unwrap();
    std::fs::write(d.path("letters/a"), "dear").unwrap();
    d.refused(
        &["snapshot", "create", "web", "--to", "letters"],
        "not empty",
    );
    d.refused(&["snapshot", "ls", "letters"], "no repository");
    d.refused(&["snapshot", "create", "nobody", "--to", "repo"], "nobody");
    bench.create("one");
    let create = ["snapshot", "create", "web", "--to", "repo", "--name", "one"];
    d.refused(&create, "already");
    d.refused(&["snapshot", "show", "repo", "two"], "no snapshot `two`");
    let restore = ["snapshot", "restore", "repo", "one"];
    d.refused(&[&restore[..], &["--to", "new"]].concat(), "root, data");
    let root = [&restore[..], &["--volume", "root", "--to"]].concat();
    d.refused(&[&root[..], &["data"]].concat(), "data");

    // An extent that is not what it was is found, and never given out.
    let extents = std::path::PathBuf::from(d.path("repo/extents"));
    let folder = std::fs::read_dir(extents).unwrap().next().unwrap().unwrap();
    let extent = std::fs::read_dir(folder.path())
        .unwrap()
        .next()
        .unwrap()
        .unwrap();
    let mut bytes = std::fs::read(extent.path()).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    bytes.truncate(last);
    std::fs::write(extent.path(), bytes).unwrap();
    let verified = d.ask(&["snapshot", "verify", "repo"]);
    assert_eq!(verified.status.code(), Some(1));
    let said = String::from_utf8_lossy(&verified.stdout).into_owned();
    assert!(
        said.contains("one: volume root") && said.contains("damaged"),
        "{said}"
    );
    assert!(err(&verified).contains("next:"), "{}", err(&verified));
    d.refused(&[&root[..], &["again"]].concat(), "damaged");
    d.refused(&[&root[..], &["./again"]].concat(), "damaged");
    assert!(!std::path::Path::new(&d.path("again")).exists());
    d.refused(&["volume", "show", "again"], "again");
}

#[test]
fn a_snapshot_that_is_broken_off_is_not_there_and_costs_nothing() {
    let bench = Bench::start();
    let d = &bench.d;
    bench.both("root", &["write -P 1 0 60M"]);
    bench.create("one");
    bench.both("root", &["write -P 2 0 1M"]);
    // Ended at once, most likely before it is done; what it would have stored the next one stores.
    let mut command = d.command(&["snapshot", "create", "web", "--to", "repo", "--name", "two"]);
    let mut child = command.spawn().unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    wait_until(|| d.ask(&["snapshot", "gc", "repo"]).status.success());
    let has_two = d.ask(&["snapshot", "show", "repo", "two"]).status.success();
    let three = bench.create("three");
    let looked_at = Bench::looked_at(&three);
    let is_known = has_two && looked_at == [(0, false), (0, false)];
    assert!(
        is_known || looked_at == [(4 * 256, false), (0, false)],
        "{three}"
    );
    bench.keep("three");
    bench.restores("three");
}

/// A client that writes one sector at a time, and knows when each is done (NBD protocol: `doc/proto.md` of the NBD
/// project; fixed newstyle, `NBD_OPT_EXPORT_NAME`, simple replies).
struct Disk(UnixStream);

impl Disk {
    fn open(d: &Daemon, name: &str) -> Disk {
        let mut stream = UnixStream::connect(d.state().join("machines/web/nbd.sock")).unwrap();
        stream.read_exact(&mut [0; 18]).unwrap();
        // Fixed newstyle, no zeroes.
        stream.write_all(&3u32.to_be_bytes()).unwrap();
        let mut option = b"IHAVEOPT".to_vec();
        option.extend(1u32.to_be_bytes());
        option.extend((name.len() as u32).to_be_bytes());
        option.extend(name.bytes());
        stream.write_all(&option).unwrap();
        stream.read_exact(&mut [0; 10]).unwrap();
        Disk(stream)
    }

    fn write(&mut self, offset: u64, sector: &[u8; 512]) {
        let mut request = 0x2560_9513u32.to_be_bytes().to_vec();
        request.extend([0, 0, 0, 1]);
        request.extend(offset.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(512u32.to_be_bytes());
        request.extend(sector);
        self.0.write_all(&request).unwrap();
        let mut reply = [0; 16];
        self.0.read_exact(&mut reply).unwrap();
        assert_eq!(reply[4..8], [0; 4], "written");
    }
}

/// Places of the writer's, far enough apart that each is an extent.
const PLACES: u64 = 200;
const APART: u64 = 300 << 10;

/// The number of the last write to each place, by a disk's content.
fn numbers(content: &[u8]) -> Vec<u64> {
    let places = (0..PLACES).map(|place| (place * APART) as usize);
    places
        .map(|at| u64::from_le_bytes(content[at..at + 8].try_into().unwrap()))
        .collect()
}

#[test]
fn all_disks_are_of_one_instant_while_they_are_written_to() {
    let bench = Bench::start();
    let d = &bench.d;
    let is_over = AtomicBool::new(false);
    let stop = StopAtEnd(&is_over);
    std::thread::scope(|scope| {
        let stop = stop;
        scope.spawn(|| {
            let mut disks = [Disk::open(d, "root"), Disk::open(d, "data")];
            for number in 1u64.. {
                if is_over.load(Ordering::Relaxed) {
                    break;
                }
                let mut sector = [0; 512];
                sector[..8].copy_from_slice(&number.to_le_bytes());
                // Neither in order nor all in one place.
                let place = number * 77 % PLACES;
                for disk in &mut disks {
                    disk.write(place * APART, &sector);
                }
            }
        });
        let mut last = 0;
        for n in 0..6 {
            let name = format!("s{n}");
            let made = bench.create(&name);
            println!(
                "pause {} us, took {} ms, put aside {}",
                made["pause_us"], made["took_ms"], made["put_aside_bytes"]
            );
            let mut newest = Vec::new();
            for disk in ["root", "data"] {
                let file = format!("./{disk}-{name}");
                d.ok(&[
                    "snapshot", "restore", "repo", &name, "--volume", disk, "--to", &file,
                ]);
                let numbers = numbers(&std::fs::read(d.path(&file)).unwrap());
                std::fs::remove_file(d.path(&file)).unwrap();
                let most = *numbers.iter().max().unwrap();
                // Of each place the last write that was done, and none after it.
                for number in most.saturating_sub(PLACES - 1).max(1)..=most {
                    let place = (number * 77 % PLACES) as usize;
                    assert_eq!(numbers[place], number, "{disk} of {name}, {most}");
                }
                newest.push(most);
            }
            let ahead = newest[0] - newest[1];
            assert!(ahead <= 1, "root has {ahead} writes that data has not");
            assert!(newest[1] >= last, "time goes back");
            last = newest[1];
        }
        assert!(last > 0, "nothing was written");
        drop(stop);
    });
    assert!(
        d.ok(&["snapshot", "verify", "repo"])
            .contains("nothing is damaged")
    );
}

/// The writer ends with the test, however that ends.
struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
