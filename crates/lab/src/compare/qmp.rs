//! A blocking QMP client, as little as the comparison needs. (QEMU Machine Protocol Specification.)

use super::{CompareError, tail};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

const ANSWER_WITHIN: Duration = Duration::from_secs(30);
const UP_WITHIN: Duration = Duration::from_secs(20);

/// An event, at the time QEMU says: since 1970.
#[derive(Clone, Debug)]
pub struct Event {
    pub name: String,
    pub at: Duration,
    pub data: Value,
}

/// A monitor. Events are kept from the connection on; a move has a few dozen.
pub struct Qmp {
    stream: UnixStream,
    answers: Receiver<Value>,
    events: Arc<Mutex<Vec<Event>>>,
    log: PathBuf,
}

impl Qmp {
    /// Connects to a QEMU that may just be starting; `log` is quoted when it is gone.
    pub fn connect(socket: &Path, log: &Path) -> Result<Qmp, CompareError> {
        let deadline = Instant::now() + UP_WITHIN;
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(_) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(20))
                }
                Err(source) => {
                    return Err(CompareError::Io {
                        path: format!("{} ({})", socket.display(), tail(log).trim()),
                        source,
                    });
                }
            }
        };
        let reader = stream.try_clone().map_err(|source| CompareError::Io {
            path: socket.display().to_string(),
            source,
        })?;
        let events = Arc::new(Mutex::new(Vec::new()));
        let theirs = Arc::clone(&events);
        let (sender, answers) = channel();
        // Ends with the connection.
        std::thread::spawn(move || {
            for line in BufReader::new(reader).lines().map_while(Result::ok) {
                let Ok(value) = serde_json::from_str::<Value>(&line) else {
                    continue;
                };
                if let Some(event) = event(&value) {
                    theirs
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push(event);
                } else if value.get("QMP").is_none() && sender.send(value).is_err() {
                    break;
                }
            }
        });
        let mut qmp = Qmp {
            stream,
            answers,
            events,
            log: log.to_owned(),
        };
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, CompareError> {
        let line = json!({ "execute": command, "arguments": arguments }).to_string() + "\n";
        let gone = || CompareError::Gone {
            doing: command.to_owned(),
            log: tail(&self.log),
        };
        self.stream.write_all(line.as_bytes()).map_err(|_| gone())?;
        let answer = match self.answers.recv_timeout(ANSWER_WITHIN) {
            Ok(answer) => answer,
            Err(RecvTimeoutError::Disconnected) => return Err(gone()),
            Err(RecvTimeoutError::Timeout) => {
                return Err(CompareError::Silent {
                    command: command.to_owned(),
                    after: ANSWER_WITHIN,
                });
            }
        };
        match answer.get("return") {
            Some(value) => Ok(value.clone()),
            None => Err(CompareError::Refused {
                command: command.to_owned(),
                said: answer["error"]["desc"].as_str().unwrap_or("").to_owned(),
            }),
        }
    }

    /// The last event of that name so far.
    pub fn last(&self, name: &str) -> Option<Event> {
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        events.iter().rfind(|event| event.name == name).cloned()
    }
}

fn event(value: &Value) -> Option<Event> {
    let seconds = value["timestamp"]["seconds"].as_u64().unwrap_or(0);
    let micros = value["timestamp"]["microseconds"].as_u64().unwrap_or(0);
    Some(Event {
        name: value.get("event")?.as_str()?.to_owned(),
        at: Duration::from_secs(seconds) + Duration::from_micros(micros),
        data: value["data"].clone(),
    })
}
