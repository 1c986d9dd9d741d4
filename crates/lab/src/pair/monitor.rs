//! A second monitor of a guest's QEMU, for what only whoever stands at the machine could do: reset it, stop it,
//! take memory from it. The daemon holds the first one.
//!
//! It is a socket in the abstract namespace: that is each host's own, so both QEMUs of a move can be given the
//! same arguments. (QEMU Machine Protocol Specification.)

use super::PairError;
use crate::LabError;
use crate::net::Namespace;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::time::{Duration, Instant};

const NAME: &str = "whimbrel-lab-monitor";

/// How long it is tried, and how long an answer may take: a QEMU whose main thread waits for a page answers late.
const PATIENCE: Duration = Duration::from_secs(30);

/// A connection to it; it serves one at a time.
pub struct Monitor {
    stream: BufReader<UnixStream>,
}

impl Monitor {
    /// What a machine that is to have one is given in its `extra_args`.
    pub fn args() -> Vec<String> {
        let words = [
            "-chardev",
            &format!("socket,id=lab,path={NAME},abstract=on,server=on,wait=off"),
            "-mon",
            "chardev=lab,mode=control",
        ];
        words.map(str::to_owned).into()
    }

    /// Connects to the one QEMU in this namespace that has one.
    pub fn connect(namespace: &Namespace) -> Result<Monitor, PairError> {
        let failed = |source| PairError::Io {
            action: "connect to",
            path: NAME.into(),
            source,
        };
        let address = SocketAddr::from_abstract_name(NAME).map_err(failed)?;
        let deadline = Instant::now() + PATIENCE;
        let stream = loop {
            let tried = namespace.run("monitor", || {
                Ok::<_, LabError>(UnixStream::connect_addr(&address))
            })?;
            match tried {
                Ok(stream) => break stream,
                Err(error) if Instant::now() >= deadline => return Err(failed(error)),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        stream.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
        let mut monitor = Monitor {
            stream: BufReader::new(stream),
        };
        monitor.execute("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, PairError> {
        let failed = |said: String| PairError::Monitor {
            command: command.to_owned(),
            said,
        };
        let line = json!({ "execute": command, "arguments": arguments }).to_string() + "\n";
        let mut stream = self.stream.get_ref();
        let written = stream.write_all(line.as_bytes());
        written.map_err(|error| failed(error.to_string()))?;
        loop {
            let mut answer = String::new();
            match self.stream.read_line(&mut answer) {
                Ok(0) => return Err(failed("it closed the connection".to_owned())),
                Ok(_) => {}
                Err(error) => return Err(failed(error.to_string())),
            }
            // The greeting and events come between.
            let answer: Value = serde_json::from_str(&answer).unwrap_or_default();
            if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            }
            if let Some(error) = answer.get("error") {
                return Err(failed(error["desc"].as_str().unwrap_or("").to_owned()));
            }
        }
    }

    /// QEMU's word for what the guest does: `running`, `paused`, ...
    pub fn status(&mut self) -> Result<String, PairError> {
        let answer = self.execute("query-status", json!({}))?;
        Ok(answer["status"].as_str().unwrap_or_default().to_owned())
    }
}
