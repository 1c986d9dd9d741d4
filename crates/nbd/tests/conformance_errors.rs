//! Every error, as the clients people use see it; and that it harms nothing.

#[allow(dead_code)]
mod fixture;
#[allow(dead_code)]
mod memory;

use fixture::{Fixture, MIB};

#[test]
fn every_wrong_request_gets_its_error_and_harms_nothing() {
    Fixture::new(4 * MIB).nbdsh(
        r"
h.set_strict_mode(0)
h.connect_uri(uri)
size = h.get_size()
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
fn a_status_beyond_the_end_is_einval() {
    Fixture::new(4 * MIB).nbdsh(
        r"
h.set_strict_mode(0)
h.add_meta_context('base:allocation')
h.connect_uri(uri)
fails('EINVAL', lambda: status(h, 1024, (4 << 20) - 512))
fails('EINVAL', lambda: status(h, 512, 4 << 20))
fails('EINVAL', lambda: status(h, 100, 0))
assert status(h, 512, 0)['base:allocation'][1] == 3
h.shutdown()
",
    );
}

#[test]
fn a_payload_over_the_largest_block_is_refused_both_ways() {
    Fixture::new(128 * MIB).nbdsh(
        r"
h.set_strict_mode(0)
h.connect_uri(uri)
big = 48 << 20
fails('EOVERFLOW', lambda: h.pread(big, 0))
fails('EINVAL', lambda: h.pwrite(bytes(big), 0))
h.pwrite(b'm' * (32 << 20), 0)
assert h.pread(32 << 20, 0) == b'm' * (32 << 20)
h.zero(128 << 20, 0)
h.shutdown()
",
    );
}

#[test]
fn a_read_only_export_refuses_what_writes_and_keeps_the_rest() {
    let fixture = Fixture::new(MIB);
    fixture.nbdsh(
        r"
h.set_strict_mode(0)
h.add_meta_context('base:allocation')
h.connect_uri(uri.replace('disk', 'ro'))
assert h.is_read_only()
fails('EPERM', lambda: h.pwrite(b'1' * 512, 0))
fails('EPERM', lambda: h.trim(512, 0))
fails('EPERM', lambda: h.zero(512, 0))
fails('EINVAL', lambda: h.pread(512, 0, flags=nbd.CMD_FLAG_FUA))
h.flush()
h.cache(512, 0)
assert h.pread(1 << 20, 0) == bytearray(1 << 20)
assert status(h, 1 << 20, 0) == {'base:allocation': [1 << 20, 3]}
h.shutdown()
",
    );
    let write = ["-f", "raw", "-c", "write 0 512", &fixture.uri("ro")];
    fixture.fail("qemu-io", &write);
    fixture.fail("nbdcopy", &["/dev/zero", &fixture.uri("ro")]);
}

#[test]
fn every_error_of_the_export_arrives_as_it_is() {
    Fixture::new(MIB).nbdsh(
        r"
h.add_meta_context('base:allocation')
h.connect_uri(uri.replace('disk', 'faulty'))
names = ['EIO', 'ENOSPC', 'EPERM', 'ENOMEM', 'EINVAL', 'EOVERFLOW', 'EIO', 'ESHUTDOWN']
for mib, name in enumerate(names, 1):
    at = mib << 20
    fails(name, lambda: h.pread(512, at))
    fails(name, lambda: h.pread_structured(512, at, lambda *a: 0, flags=nbd.CMD_FLAG_DF))
    fails(name, lambda: h.pwrite(b'1' * 512, at))
    fails(name, lambda: h.trim(512, at))
    fails(name, lambda: h.zero(512, at))
    fails(name, lambda: h.cache(512, at))
    fails(name, lambda: status(h, 512, at))
    assert h.pread(512, 0) == bytearray(512)
# The one place where the protocol knows ENOTSUP.
fails('ENOTSUP', lambda: h.zero(512, 7 << 20, flags=nbd.CMD_FLAG_FAST_ZERO))
h.shutdown()
",
    );
}

#[test]
fn errors_without_structured_replies() {
    Fixture::new(MIB).nbdsh(
        r"
h.set_request_structured_replies(False)
h.connect_uri(uri.replace('disk', 'faulty'))
for mib, name in enumerate(['EIO', 'ENOSPC', 'EPERM', 'ENOMEM'], 1):
    fails(name, lambda: h.pread(512, mib << 20))
    fails(name, lambda: h.pwrite(b'1' * 512, mib << 20))
assert h.pread(512, 0) == bytearray(512)
h.shutdown()
",
    );
}

#[test]
fn qemu_sees_the_errors_over_extended_headers() {
    let fixture = Fixture::new(MIB);
    let uri = fixture.uri("faulty");
    for (commands, expected) in [
        ("read 1M 512", "read failed: Input/output error"),
        ("write 1M 512", "write failed: Input/output error"),
        ("write 2M 512", "write failed: No space left on device"),
        ("read 3M 512", "read failed: Operation not permitted"),
        ("read 4M 512", "read failed: Cannot allocate memory"),
        ("discard 2M 512", "discard failed: No space left on device"),
        ("write -z 2M 4k", "write failed: No space left on device"),
    ] {
        let args = ["-f", "raw", "-c", commands, "-c", "read 0 512", &uri];
        let output = fixture.try_run("qemu-io", &args);
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(said.contains(expected), "{commands}: {said}");
        assert!(said.contains("read 512/512 bytes"), "{commands}: {said}");
    }
}

#[test]
fn the_tools_notice_a_failing_export() {
    let fixture = Fixture::new(MIB);
    let (uri, copy) = (fixture.uri("faulty"), fixture.arg("copy"));
    // Begins where nothing fails.
    fixture.qemu_io("faulty", &["write 512k 1M"]);
    fixture.fail(
        "nbdcopy",
        &["--allocated", "--request-size=1048576", &uri, &copy],
    );
    let convert = ["convert", "-f", "raw", "-O", "raw", "-S", "0", &uri, &copy];
    fixture.fail("qemu-img", &convert);
}
