//! A small disk and QEMU around it, for the guest tests.
#![allow(
    dead_code,
    reason = "each test file compiles this module and uses its part of it"
)]

use std::net::{TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use whimbrel_lab::guest::{Ack, BootFiles, Control, Disk, DiskSpec, Line, Params, cache_dir};

/// Built once per checkout, a second or two.
pub fn small_disk() -> Disk {
    let spec = DiskSpec {
        size_mib: 256,
        files_mib: 40,
        ..DiskSpec::default()
    };
    spec.build(&cache_dir()).expect("the small disk builds")
}

/// The default workloads, with files that fit the small disk.
pub fn small_params() -> Params {
    let mut params = Params::default();
    params.ram.hot_mib = 16;
    params.ram.region_mib = 16;
    params.log.max_mib = 8;
    params.random.file_mib = 8;
    params.read.drop_s = 3;
    params
}

/// A guest under QEMU's user network: its control port and reports come to this machine's loopback.
pub struct Guest {
    qemu: Child,
    console: PathBuf,
    reports: UdpSocket,
    control: u16,
    echo: u16,
    started: Instant,
    /// The highest numbers heard.
    pub acknowledged: Ack,
}

impl Guest {
    pub fn start(dir: &Path, image: &Path, memory_mib: u32, mut params: Params) -> Guest {
        let boot = BootFiles::prepare(&cache_dir()).expect("kernel, busybox and program");
        let reports = UdpSocket::bind("127.0.0.1:0").expect("a port");
        reports
            .set_read_timeout(Some(Duration::from_millis(200)))
            .expect("a timeout");
        let free = TcpListener::bind("127.0.0.1:0").expect("a port");
        let control = free.local_addr().expect("bound").port();
        drop(free);
        let free = UdpSocket::bind("127.0.0.1:0").expect("a port");
        let echo = free.local_addr().expect("bound").port();
        drop(free);
        // QEMU's user network: the guest is .15, this machine's loopback is .2.
        let net = Params::parse("wl.ip=10.0.2.15/24 wl.gw=10.0.2.2 wl.client=10.0.2.2");
        let net = net.expect("valid");
        (params.ip, params.gateway, params.client) = (net.ip, net.gateway, net.client);
        params.client_port = reports.local_addr().expect("bound").port();
        let console = dir.join("console");
        let forward = format!(
            "user,id=n0,hostfwd=tcp:127.0.0.1:{control}-:7008,hostfwd=udp:127.0.0.1:{echo}-:7"
        );
        let drive = format!(
            "file={},format=raw,if=none,id=d0,cache=writeback",
            image.display()
        );
        let qemu = Command::new("qemu-system-x86_64")
            .args(["-M", "q35", "-accel", "tcg", "-nographic", "-nodefaults"])
            .args(["-no-reboot", "-m", &memory_mib.to_string()])
            .args(["-serial", &format!("file:{}", console.display())])
            .args(["-drive", &drive, "-device", "virtio-blk-pci,drive=d0"])
            .args(["-netdev", &forward, "-device", "virtio-net-pci,netdev=n0"])
            .args(boot.qemu_args(&params))
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-system-x86_64 starts");
        Guest {
            qemu,
            console,
            reports,
            control,
            echo,
            started: Instant::now(),
            acknowledged: Ack::default(),
        }
    }

    /// Listens for `time`; the lines heard, acknowledgements kept.
    pub fn listen(&mut self, time: Duration) -> Vec<Line> {
        let until = Instant::now() + time;
        let mut lines = Vec::new();
        while Instant::now() < until {
            lines.extend(self.hear());
        }
        lines
    }

    fn hear(&mut self) -> Option<Line> {
        let mut datagram = [0; 4096];
        let len = self.reports.recv(&mut datagram).ok()?;
        let line = Line::find(std::str::from_utf8(&datagram[..len]).expect("JSON"))?;
        if let Line::Ack(ack) = line {
            self.acknowledged = self.acknowledged.max(ack);
        }
        Some(line)
    }

    /// Listens until a line is of the wanted kind.
    pub fn wait_for(&mut self, wanted: impl Fn(&Line) -> bool) -> (Line, Duration) {
        let until = Instant::now() + Duration::from_secs(180);
        while Instant::now() < until {
            if let Some(line) = self.hear()
                && wanted(&line)
            {
                return (line, self.started.elapsed());
            }
        }
        panic!("not heard; the console says:\n{}", self.console());
    }

    pub fn control(&self) -> Control {
        let address = ("127.0.0.1", self.control);
        Control::connect(address, Duration::from_secs(180)).expect("the guest answers")
    }

    /// What the guest's echo answers.
    pub fn echo(&self, datagram: &[u8]) -> Vec<u8> {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a port");
        let patience = Some(Duration::from_secs(120));
        socket.set_read_timeout(patience).expect("a timeout");
        let guest = ("127.0.0.1", self.echo);
        socket.send_to(datagram, guest).expect("sent");
        let mut answer = vec![0; 2048];
        let len = socket.recv(&mut answer).expect("an answer");
        answer.truncate(len);
        answer
    }

    pub fn console(&self) -> String {
        let bytes = std::fs::read(&self.console).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Seconds of processor QEMU has used.
    pub fn cpu_seconds(&self) -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.qemu.id()));
        let stat = stat.expect("QEMU runs");
        let after_name = stat.rsplit(')').next().expect("a name in parentheses");
        let fields: Vec<&str> = after_name.split_whitespace().collect();
        let ticks: u64 = fields[11..13]
            .iter()
            .map(|f| f.parse::<u64>().expect("a number"))
            .sum();
        ticks as f64 / 100.0
    }

    /// Waits for QEMU to end by itself.
    pub fn ended(&mut self) -> bool {
        let until = Instant::now() + Duration::from_secs(120);
        while Instant::now() < until {
            if self.qemu.try_wait().expect("our child").is_some() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        false
    }

    /// What a power cut does, seen from the disk.
    pub fn kill(&mut self) {
        self.qemu.kill().expect("our child");
        self.qemu.wait().expect("our child");
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Both fail only for one that has ended already.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}
