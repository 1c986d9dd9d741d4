//! Hosts of their own: a state directory each, and a daemon on the loopback for those that run.

use super::{code, err, out, whimbrel};
use serde_json::Value;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

/// A host and, if it runs, its daemon, which ends with this.
pub struct Host {
    pub state: PathBuf,
    daemon: Option<Child>,
    _dir: tempfile::TempDir,
}

impl Host {
    pub fn new(name: &str) -> Host {
        let dir = tempfile::tempdir().unwrap();
        let host = Host {
            state: dir.path().join("state"),
            daemon: None,
            _dir: dir,
        };
        host.does(&format!("host init --name {name}"));
        host
    }

    pub fn running(name: &str) -> Host {
        let mut host = Host::new(name);
        host.start();
        host
    }

    pub fn start(&mut self) {
        self.start_at("127.0.0.1:0");
    }

    pub fn start_at(&mut self, listen: &str) {
        let log = std::fs::File::create(self.log()).unwrap();
        let daemon = Command::new(env!("CARGO_BIN_EXE_whimbrel"))
            .args(["host", "run", "--listen", listen, "--state"])
            .arg(&self.state)
            .env_remove("RUST_LOG")
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.daemon = Some(daemon);
        while self.shown()["daemon"].is_null() {
            let daemon = self.daemon.as_mut().unwrap();
            if let Some(status) = daemon.try_wait().unwrap() {
                panic!("the daemon ended with {status}: {}", self.log_text());
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }

    pub fn stop(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            // It asks nothing of the daemon, like a crash.
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }

    fn log(&self) -> PathBuf {
        self.state.with_extension("log")
    }

    pub fn log_text(&self) -> String {
        std::fs::read_to_string(self.log()).unwrap_or_default()
    }

    /// Runs a command that must succeed, and has its answer.
    pub fn does(&self, line: &str) -> Value {
        let output = whimbrel(&self.state, &format!("{line} --json"));
        assert_eq!(code(&output), 0, "{line}: {}", err(&output));
        serde_json::from_str(&out(&output)).unwrap()
    }

    /// Runs a command that must fail, and has the error, of which every part is there.
    pub fn refused(&self, line: &str) -> Value {
        let output = whimbrel(&self.state, &format!("{line} --json"));
        assert_eq!(code(&output), 1, "{line}: {}", out(&output));
        let told: Value = serde_json::from_str(&err(&output)).unwrap();
        let error = told["error"].clone();
        assert!(
            error["what"].is_string() && error["next_step"].is_string(),
            "{error}"
        );
        error
    }

    pub fn shown(&self) -> Value {
        self.does("host show")
    }

    pub fn invites(&self, options: &str) -> String {
        let invited = self.does(&format!("host invite {options}"));
        invited["token"].as_str().unwrap().to_string()
    }

    /// The names and keys of the hosts it trusts.
    pub fn trusts(&self) -> Vec<(String, String)> {
        let list = self.does("host ls");
        let text = |v: &Value| v.as_str().unwrap().to_string();
        let peers = list["items"].as_array().unwrap().iter();
        peers.map(|p| (text(&p["name"]), text(&p["key"]))).collect()
    }

    pub fn key(&self) -> String {
        self.shown()["key"].as_str().unwrap().to_string()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.stop();
    }
}

pub fn contains(error: &Value, part: &str, words: &str) {
    let text = error[part].as_str().unwrap_or_default();
    assert!(text.contains(words), "{part}: {error}");
}
