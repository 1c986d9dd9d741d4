//! The clients people use, against a memory export on a Unix socket. A tool that is not installed
//! skips its test, and says so.

#[allow(dead_code)]
mod memory;

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use memory::{Memory, Shelf};
use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use whimbrel_nbd::{ExportInfo, Limits, Server};

const MIB: u64 = 1 << 20;

/// A server with exports `disk` (the default), `plain` (which knows no contexts) and `ro`.
struct Fixture {
    dir: TempDir,
    runtime: Runtime,
    directory: Arc<Shelf<Memory>>,
    serving: JoinHandle<()>,
    shutdown: CancellationToken,
}

impl Fixture {
    fn new(size: u64) -> Self {
        let dir = TempDir::new().unwrap();
        let runtime = Runtime::new().unwrap();
        let read_only = ExportInfo {
            read_only: true,
            ..ExportInfo::new(MIB)
        };
        let directory = Shelf::of([
            ("disk", Memory::new(size)),
            ("plain", Memory::with(ExportInfo::new(size))),
            ("ro", Memory::with(read_only)),
        ]);
        let (serving, shutdown) = listen(&runtime, &dir.path().join("nbd"), directory.clone());
        Fixture {
            dir,
            runtime,
            directory,
            serving,
            shutdown,
        }
    }

    /// Shuts the server down in order and starts another, which has the same exports.
    fn restart(&mut self) {
        self.shutdown.cancel();
        self.runtime.block_on(&mut self.serving).unwrap();
        let path = self.path("nbd");
        std::fs::remove_file(&path).unwrap();
        (self.serving, self.shutdown) = listen(&self.runtime, &path, self.directory.clone());
    }

    fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.path("nbd").display())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs a tool that must succeed; its standard output.
    fn run(&self, tool: &str, args: &[&str]) -> String {
        let output = self.try_run(tool, args);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "{tool} {args:?}\n{out}\n{err}");
        out
    }

    fn try_run(&self, tool: &str, args: &[&str]) -> Output {
        command(tool).args(args).output().unwrap()
    }

    /// Runs a script with `h`, a handle of libnbd that has yet to be connected, and `uri`.
    fn nbdsh(&self, script: &str) {
        let prelude = format!("import errno\nuri = '{}'\n", self.uri("disk"));
        self.run("nbdsh", &["-c", &(prelude + script)]);
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.shutdown.cancel();
        let ended = self.runtime.block_on(&mut self.serving);
        if !std::thread::panicking() {
            ended.expect("the server ends in order");
        }
    }
}

fn listen(
    runtime: &Runtime,
    path: &Path,
    directory: Arc<Shelf<Memory>>,
) -> (JoinHandle<()>, CancellationToken) {
    let _context = runtime.enter();
    let listener = UnixListener::bind(path).unwrap();
    let shutdown = CancellationToken::new();
    let stop = shutdown.clone();
    let serving = runtime.spawn(async move {
        let server = Server::new(directory, Limits::default());
        server.serve_unix(listener, stop).await;
    });
    (serving, shutdown)
}

/// A tool to be run. nbdsh takes the first python3 it finds, and libnbd's module is that of the system.
fn command(tool: &str) -> Command {
    let mut path = std::ffi::OsString::from("/usr/bin:");
    path.push(std::env::var_os("PATH").unwrap_or_default());
    let mut command = Command::new(tool);
    command.env("PATH", path);
    command
}

fn have(tool: &str) -> bool {
    let found = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(tool).is_file()));
    let works = found && (tool != "nbdsh" || imports_nbd());
    if !works {
        eprintln!("skipped: {tool} is not installed");
    }
    works
}

fn imports_nbd() -> bool {
    let tried = command("nbdsh").args(["-c", "nbd.NBD()"]).output();
    tried.is_ok_and(|output| output.status.success())
}

/// Content with data, zeroes and a last block that is no whole page.
fn content(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = vec![0; len];
    for (index, word) in bytes.chunks_mut(8).enumerate() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        if (index >> 15) % 3 != 1 {
            word.copy_from_slice(&state.to_le_bytes()[..word.len()]);
        }
    }
    bytes
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn nbdinfo_lists_describes_and_maps() {
    if !have("nbdinfo") {
        return;
    }
    let fixture = Fixture::new(8 * MIB);
    let all = fixture.run("nbdinfo", &["--list", "--json", &fixture.uri("")]);
    for expected in [
        "\"export-name\": \"disk\"",
        "\"export-name\": \"plain\"",
        "\"export-name\": \"ro\"",
        "\"structured\": true",
        "\"base:allocation\"",
        "\"is_read_only\": true",
        "\"can_fast_zero\": true",
        "\"can_multi_conn\": true",
        "\"block_size_minimum\": 512",
        "\"block_size_preferred\": 4096",
        "\"block_size_maximum\": 33554432",
        "\"export-size\": 8388608",
    ] {
        assert!(all.contains(expected), "{expected}\n{all}");
    }
    let one = fixture.run("nbdinfo", &["--json", &fixture.uri("disk")]);
    let description = "\"description\": \"whimbrel memory\"";
    assert!(one.contains(description), "{one}");
    if !have("qemu-io") {
        return;
    }
    let write = ["-f", "raw", "-c", "write 1M 64k", &fixture.uri("disk")];
    fixture.run("qemu-io", &write);
    let map = fixture.run("nbdinfo", &["--map", &fixture.uri("disk")]);
    let rows: Vec<Vec<&str>> = map
        .lines()
        .map(|l| l.split_whitespace().collect())
        .collect();
    assert_eq!(
        rows,
        [
            ["0", "1048576", "3", "hole,zero"],
            ["1048576", "65536", "0", "data"],
            ["1114112", "7274496", "3", "hole,zero"],
        ]
    );
}

#[test]
fn nbdcopy_in_and_out_by_every_way_of_copying() {
    if !have("nbdcopy") {
        return;
    }
    let fixture = Fixture::new(16 * MIB);
    let (source, back) = (fixture.path("source"), fixture.path("back"));
    let bytes = content(16 << 20);
    std::fs::write(&source, &bytes).unwrap();
    for options in [
        &[][..],
        &["--synchronous"],
        &["--connections=4", "--requests=64", "--flush"],
        &["--request-size=4194304", "--destination-is-zero"],
        &["--allocated"],
    ] {
        let fixture = Fixture::new(16 * MIB);
        let uri = fixture.uri("disk");
        fixture.run("nbdcopy", &[options, &[text(&source), &uri]].concat());
        fixture.run("nbdcopy", &[options, &[&uri, text(&back)]].concat());
        assert!(std::fs::read(&back).unwrap() == bytes, "{options:?}");
        std::fs::remove_file(&back).unwrap();
    }
}

#[test]
fn qemu_img_converts_in_and_out_and_finds_no_difference() {
    if !have("qemu-img") {
        return;
    }
    let fixture = Fixture::new(16 * MIB);
    let (uri, raw, copy) = (
        fixture.uri("disk"),
        fixture.path("raw"),
        fixture.path("copy"),
    );
    std::fs::write(&raw, content(16 << 20)).unwrap();
    let info = fixture.run("qemu-img", &["info", "-f", "raw", &uri]);
    assert!(info.contains("virtual size: 16 MiB"), "{info}");
    for parallel in [&["-S", "0"][..], &[], &["-m", "16", "-W"]] {
        let both = ["convert", "-n", "-f", "raw", "-O", "raw", text(&raw), &uri];
        fixture.run("qemu-img", &[&both[..1], parallel, &both[1..]].concat());
        fixture.run(
            "qemu-img",
            &["compare", "-f", "raw", "-F", "raw", text(&raw), &uri],
        );
    }
    let out = ["convert", "-f", "raw", "-O", "qcow2", &uri, text(&copy)];
    fixture.run("qemu-img", &out);
    fixture.run(
        "qemu-img",
        &[
            "compare",
            "-f",
            "raw",
            "-F",
            "qcow2",
            text(&raw),
            text(&copy),
        ],
    );
    let map = fixture.run("qemu-img", &["map", "-f", "raw", "--output=json", &uri]);
    assert!(map.contains("\"zero\": true"), "{map}");
}

#[test]
fn a_qcow2_image_lives_inside_an_export() {
    if !have("qemu-img") || !have("qemu-io") {
        return;
    }
    let fixture = Fixture::new(16 * MIB);
    let uri = fixture.uri("plain");
    fixture.run("qemu-img", &["create", "-f", "qcow2", &uri, "64M"]);
    let write = [
        "-f",
        "qcow2",
        "-c",
        "write -P 9 1M 3M",
        "-c",
        "discard 2M 1M",
        &uri,
    ];
    fixture.run("qemu-io", &write);
    fixture.run("qemu-io", &["-f", "qcow2", "-c", "read -P 9 1M 1M", &uri]);
    fixture.run("qemu-img", &["check", "-f", "qcow2", &uri]);
}

#[test]
fn qemu_io_writes_zeroes_discards_and_flushes() {
    if !have("qemu-io") {
        return;
    }
    let fixture = Fixture::new(16 * MIB);
    for commands in [
        &["write -P 0x11 0 1M", "read -P 0x11 0 1M"][..],
        &[
            "write -f -P 0x22 512 512",
            "read -P 0x22 512 512",
            "read -P 0x11 1024 512",
        ],
        &["write -z 4k 64k", "read -P 0 4k 64k", "read -P 0x11 68k 4k"],
        &["write -z -u 128k 128k", "read -P 0 128k 128k"],
        &["write -z -u -n 256k 4k", "read -P 0 256k 4k"],
        &["discard 512k 512k", "read -P 0 512k 512k"],
        &[
            "aio_write -P 0x33 1M 8M",
            "aio_read -P 0x11 68k 4k",
            "aio_flush",
            "flush",
        ],
        &["read -P 0x33 1M 8M"],
        &[
            "writev -P 0x44 10M 512 4096 512 1M",
            "readv -P 0x44 10M 1M 4096 1024",
        ],
    ] {
        let mut args = vec!["-f", "raw"];
        for command in commands {
            args.extend(["-c", command]);
        }
        let uri = fixture.uri("disk");
        args.push(&uri);
        let out = fixture.run("qemu-io", &args);
        assert!(!out.contains("failed") && !out.contains("error"), "{out}");
    }
    let write = ["-f", "raw", "-c", "write 0 512", &fixture.uri("ro")];
    assert!(!fixture.try_run("qemu-io", &write).status.success());
}

#[test]
fn qemu_reconnects_to_a_restarted_server_and_sees_no_error() {
    if !have("qemu-io") {
        return;
    }
    let mut fixture = Fixture::new(16 * MIB);
    let options = format!(
        "driver=nbd,server.type=unix,server.path={},export=disk,reconnect-delay=60",
        fixture.path("nbd").display()
    );
    let mut qemu = command("qemu-io")
        .args(["--image-opts", &options])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut say = qemu.stdin.take().unwrap();
    let mut lines = BufReader::new(qemu.stdout.take().unwrap()).lines();
    let mut hear = |word: &str| {
        for line in lines.by_ref() {
            let line = line.unwrap();
            assert!(
                !line.contains("failed") && !line.contains("error"),
                "{line}"
            );
            if line.contains(word) {
                return;
            }
        }
        panic!("qemu-io ended without {word}");
    };
    for pattern in 1..6 {
        writeln!(say, "write -P {pattern} 4k 64k").unwrap();
        hear("wrote 65536");
        fixture.restart();
        writeln!(say, "read -P {pattern} 4k 64k").unwrap();
        hear("read 65536");
    }
    writeln!(say, "quit").unwrap();
    assert!(qemu.wait().unwrap().success());
}

#[test]
fn nbdsh_many_requests_of_many_sizes_in_flight() {
    if !have("nbdsh") {
        return;
    }
    Fixture::new(64 * MIB).nbdsh(
        r"
import random
random.seed(7)
h.connect_uri(uri)
pos = 0
want = []
while True:
    size = 512 * random.choice([1, 3, 8, 64, 513, 2048, 8192])
    if pos + size > h.get_size(): break
    data = random.randbytes(size)
    want.append((pos, data))
    h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), pos)
    pos += size
    while h.aio_in_flight() > 64: h.poll(-1)
while h.aio_in_flight(): h.poll(-1)
random.shuffle(want)
reads = []
for pos, data in want:
    buf = nbd.Buffer(len(data))
    reads.append((h.aio_pread(buf, pos), buf, data))
while h.aio_in_flight(): h.poll(-1)
for cookie, buf, data in reads:
    assert h.aio_command_completed(cookie)
    assert buf.to_bytearray() == data
h.shutdown()
",
    );
}

#[test]
fn nbdsh_every_wrong_request_gets_its_error_and_harms_nothing() {
    if !have("nbdsh") {
        return;
    }
    Fixture::new(4 * MIB).nbdsh(
        r"
h.set_strict_mode(0)
h.connect_uri(uri)
size = h.get_size()
def fails(name, call):
    try: call()
    except nbd.Error as e: assert e.errno == name, (e.errno, name)
    else: assert False, name
fails('EINVAL', lambda: h.pread(512, size))
fails('EINVAL', lambda: h.pread(1024, size - 512))
fails('EINVAL', lambda: h.pread(512, 1))
fails('EINVAL', lambda: h.pread(100, 0))
fails('EINVAL', lambda: h.pread(512, 2**63))
fails('ENOSPC', lambda: h.pwrite(b'1' * 512, size))
fails('ENOSPC', lambda: h.pwrite(b'1' * 1048576, size - 512))
fails('EINVAL', lambda: h.pwrite(b'1' * 513, 0))
fails('EINVAL', lambda: h.trim(1024, size - 512))
fails('ENOSPC', lambda: h.zero(1024, size - 512))
fails('EINVAL', lambda: h.cache(1024, size - 512))
fails('EINVAL', lambda: h.pread(512, 0, flags=nbd.CMD_FLAG_NO_HOLE))
fails('EINVAL', lambda: h.pwrite(b'1' * 512, 0, flags=nbd.CMD_FLAG_REQ_ONE))
fails('EINVAL', lambda: h.trim(512, 0, flags=nbd.CMD_FLAG_FAST_ZERO))
fails('EINVAL', lambda: h.block_status(512, 0, lambda *a: 0))
fails('ENOTSUP', lambda: h.zero(512, 0, flags=nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE))
h.flush(flags=nbd.CMD_FLAG_FUA)
h.zero(512, 0, flags=nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE)
h.trim(512, 0, flags=nbd.CMD_FLAG_FUA)
h.cache(size, 0)
assert h.pread(size, 0) == bytearray(size)
h.shutdown()
",
    );
}

#[test]
fn nbdsh_a_payload_over_the_largest_block_is_refused_both_ways() {
    if !have("nbdsh") {
        return;
    }
    Fixture::new(128 * MIB).nbdsh(
        r"
h.set_strict_mode(0)
h.connect_uri(uri)
big = 48 << 20
for call, name in [(lambda: h.pread(big, 0), 'EOVERFLOW'), (lambda: h.pwrite(bytes(big), 0), 'EINVAL')]:
    try: call()
    except nbd.Error as e: assert e.errno == name, e.errno
    else: assert False
h.pwrite(b'm' * (32 << 20), 0)
assert h.pread(32 << 20, 0) == b'm' * (32 << 20)
h.zero(128 << 20, 0)
h.shutdown()
",
    );
}

#[test]
fn nbdsh_structured_reads_come_in_one_chunk_with_and_without_df() {
    if !have("nbdsh") {
        return;
    }
    Fixture::new(4 * MIB).nbdsh(
        r"
h.connect_uri(uri)
assert h.get_structured_replies_negotiated() and h.can_df()
h.pwrite(b'd' * 65536, 65536)
for flags in [0, nbd.CMD_FLAG_DF]:
    seen = []
    def chunk(buf, offset, status, error):
        seen.append((len(buf), offset, status))
    h.pread_structured(262144, 0, chunk, flags=flags)
    assert seen == [(262144, 0, nbd.READ_DATA)], seen
h.shutdown()
",
    );
}

#[test]
fn nbdsh_without_structured_replies_everything_but_status_works() {
    if !have("nbdsh") {
        return;
    }
    Fixture::new(4 * MIB).nbdsh(
        r"
h.set_request_structured_replies(False)
h.connect_uri(uri)
assert not h.can_df()
h.pwrite(b'd' * 65536, 65536, flags=nbd.CMD_FLAG_FUA)
assert h.pread(65536, 65536) == b'd' * 65536
h.set_strict_mode(0)
try: h.pread(512, 1 << 40)
except nbd.Error as e: assert e.errno == 'EINVAL'
else: assert False
h.zero(65536, 65536)
assert h.pread(65536, 65536) == bytearray(65536)
h.shutdown()
",
    );
}

#[test]
fn nbdsh_block_status_whole_and_one_at_a_time() {
    if !have("nbdsh") {
        return;
    }
    Fixture::new(4 * MIB).nbdsh(
        r"
h.add_meta_context('base:allocation')
h.add_meta_context('unknown:context')
h.connect_uri(uri)
assert h.can_meta_context('base:allocation')
assert not h.can_meta_context('unknown:context')
h.pwrite(b'd' * 65536, 65536)
def status(*args, **kw):
    got = []
    h.block_status(*args, lambda ctx, off, entries, err: got.append((ctx, off, entries)), **kw)
    assert len(got) == 1 and got[0][0] == 'base:allocation'
    return got[0][2]
assert status(4194304, 0) == [65536, 3, 65536, 0, 4063232, 3]
assert status(4194304, 0, flags=nbd.CMD_FLAG_REQ_ONE) == [65536, 3]
assert status(512, 70000 // 512 * 512, flags=nbd.CMD_FLAG_REQ_ONE) == [512, 0]
h.shutdown()
",
    );
}

#[test]
fn nbdsh_options_one_by_one() {
    if !have("nbdsh") {
        return;
    }
    Fixture::new(4 * MIB).nbdsh(
        r"
h.set_opt_mode(True)
h.connect_uri(uri)
names = []
h.opt_list(lambda name, description: names.append(name))
assert names == ['disk', 'plain', 'ro'], names
contexts = []
h.opt_list_meta_context(lambda name: contexts.append(name))
assert contexts == ['base:allocation'], contexts
h.set_export_name('nowhere')
try: h.opt_go()
except nbd.Error: pass
else: assert False
h.set_export_name('ro')
h.opt_info()
assert h.is_read_only() and not h.can_trim() and not h.can_zero() and not h.can_fua()
h.set_export_name('disk')
h.set_full_info(True)
h.opt_info()
assert h.get_canonical_export_name() == 'disk'
assert h.get_export_description() == 'whimbrel memory'
h.opt_go()
h.pread(512, 0)
h.shutdown()
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_uri(uri)
h.opt_abort()
",
    );
}

#[test]
fn nbdsh_old_handshakes() {
    if !have("nbdsh") {
        return;
    }
    Fixture::new(4 * MIB).nbdsh(
        r"
for flags in [0, nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE, nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE | nbd.HANDSHAKE_FLAG_NO_ZEROES]:
    h = nbd.NBD()
    h.set_handshake_flags(flags)
    h.connect_uri(uri)
    assert h.get_size() == 4 << 20
    h.pread(512, 0)
    h.shutdown()
",
    );
}

#[test]
fn nbdsh_wants_tls_and_goes_on_without() {
    if !have("nbdsh") {
        return;
    }
    Fixture::new(4 * MIB).nbdsh(
        r"
if h.supports_tls():
    h.set_tls(nbd.TLS_ALLOW)
    h.set_uri_allow_tls(nbd.TLS_ALLOW)
    h.connect_uri(uri)
    assert not h.get_tls_negotiated()
    h.pread(512, 0)
",
    );
}
