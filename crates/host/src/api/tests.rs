//! The API over a real unix socket, against a daemon made of memory. Requests are written by hand: the
//! tests see what any HTTP client sees.

use super::fake::{FakeService, SAMPLE_TOKEN, sample_migration};
use super::*;
use serde_json::Value;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use whimbrel_engine::switchover::Phase;

struct Daemon {
    service: Arc<FakeService>,
    path: PathBuf,
    stopping: CancellationToken,
    served: JoinHandle<io::Result<()>>,
    _dir: tempfile::TempDir,
}

async fn daemon() -> Daemon {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api.sock");
    let socket = bind(&path).await.unwrap();
    let service = Arc::new(FakeService::new());
    let stopping = CancellationToken::new();
    let served = tokio::spawn(serve(socket, service.clone(), stopping.clone()));
    Daemon {
        service,
        path,
        stopping,
        served,
        _dir: dir,
    }
}

impl Daemon {
    async fn send(&self, method: &str, path: &str, body: &str) -> UnixStream {
        let mut stream = UnixStream::connect(&self.path).await.unwrap();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        // A server that refuses a long body early may close before it is all written.
        let _ = stream.write_all(body.as_bytes()).await;
        stream
    }

    /// Status and body; chunked encoding is taken off line by line, which suits JSON lines.
    async fn ask(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let mut stream = self.send(method, path, body).await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        let text = String::from_utf8(answer).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (
            head.split(' ').nth(1).unwrap().parse().unwrap(),
            body.to_string(),
        )
    }

    async fn json(&self, method: &str, path: &str, body: &str) -> (u16, Value) {
        let (status, text) = self.ask(method, path, body).await;
        (status, serde_json::from_str(&text).unwrap_or(Value::Null))
    }
}

fn lines(body: &str) -> Vec<Value> {
    body.lines()
        .filter_map(|l| {
            serde_json::from_str::<Value>(l)
                .ok()
                .filter(Value::is_object)
        })
        .collect()
}

#[tokio::test]
async fn every_operation_reaches_its_method() {
    let d = daemon().await;
    let key = format!("whk1-{}", "a".repeat(52));
    let trust = format!("{{\"name\":\"c\",\"key\":\"{key}\",\"addresses\":[\"c:1\"]}}");
    let join = format!("{{\"token\":\"{SAMPLE_TOKEN}\"}}");
    let spec = "{\"name\":\"web2\",\"memory\":\"64MiB\"}";
    for (method, path, body) in [
        ("GET", "/v1/host", ""),
        ("GET", "/v1/peers", ""),
        ("PUT", "/v1/peers", trust.as_str()),
        ("DELETE", "/v1/peers/b", ""),
        ("DELETE", "/v1/peers/b?force=true", ""),
        ("POST", "/v1/peers/b/rename", "{\"name\":\"c\"}"),
        ("POST", "/v1/peers/b/allow", "{\"send\":false}"),
        ("GET", "/v1/invitations", ""),
        ("POST", "/v1/invitations", ""),
        ("DELETE", "/v1/invitations/0123456789abcdef", ""),
        ("POST", "/v1/joins", join.as_str()),
        ("GET", "/v1/volumes", ""),
        ("POST", "/v1/volumes", "{\"name\":\"v\",\"size\":\"1GiB\"}"),
        ("GET", "/v1/volumes/root", ""),
        ("DELETE", "/v1/volumes/root", ""),
        ("GET", "/v1/machines", ""),
        ("POST", "/v1/machines", spec),
        ("GET", "/v1/machines/web1", ""),
        ("POST", "/v1/machines/web1/start", ""),
        ("POST", "/v1/machines/web1/stop", ""),
        ("POST", "/v1/machines/web1/stop", "{\"force\":true}"),
        ("POST", "/v1/machines/web1/resume", ""),
        (
            "POST",
            "/v1/adoptions",
            "{\"spec\":{\"name\":\"web3\",\"memory\":\"64MiB\"},\"qmp\":\"/q\"}",
        ),
        ("DELETE", "/v1/machines/web1", ""),
        ("GET", "/v1/migrations", ""),
        (
            "POST",
            "/v1/migrations",
            "{\"machine\":\"web1\",\"to\":\"b\",\"bandwidth\":\"80Mbit\",\"hold\":true}",
        ),
        ("GET", "/v1/migrations/m-1", ""),
        ("POST", "/v1/machines/web1/switch", ""),
        (
            "POST",
            "/v1/machines/web1/throttle",
            "{\"bandwidth\":\"unlimited\"}",
        ),
        ("POST", "/v1/machines/web1/cancel", ""),
    ] {
        let (status, text) = d.ask(method, path, body).await;
        assert_eq!(status, 200, "{method} {path}: {text}");
    }
    assert_eq!(
        d.service.calls(),
        [
            "trust c",
            "revoke b force=false",
            "revoke b force=true",
            "rename b c",
            "allow b receive",
            "invite 900 s",
            "cancel invitation 0123456789abcdef",
            "join oslo",
            "create v 1GiB",
            "remove root",
            "define web2",
            "start web1",
            "stop web1 force=false",
            "stop web1 force=true",
            "resume web1",
            "adopt web3 /q",
            "undefine web1",
            "migrate web1 b 80Mbit hold=true Auto",
            "switch web1",
            "throttle web1 unlimited",
            "cancel web1",
        ]
    );
}

#[tokio::test]
async fn a_refusal_says_what_and_what_next() {
    let d = daemon().await;
    let (status, error) = d.json("GET", "/v1/machines/web9", "").await;
    assert_eq!((status, &error["code"]), (404, &Value::from("not-found")));
    assert!(error["next_step"].is_string() && error["machine_state"].is_string());
    let (status, _) = d
        .json(
            "POST",
            "/v1/volumes",
            "{\"name\":\"root\",\"size\":\"1GiB\"}",
        )
        .await;
    assert_eq!(status, 409);
}

#[tokio::test]
async fn what_makes_no_sense_is_refused_before_the_daemon_sees_it() {
    let d = daemon().await;
    for (method, path, body, word) in [
        ("GET", "/v1/machines/Web1", "", "'W'"),
        ("GET", "/v1/machines/..%2f..%2fetc", "", "position 1"),
        (
            "POST",
            "/v1/volumes",
            "{\"name\":\"v\",\"size\":\"lots\"}",
            "not a size",
        ),
        (
            "POST",
            "/v1/volumes",
            "{\"name\":\"v\",\"size\":\"1GiB\",\"sparse\":true}",
            "unknown field `sparse`",
        ),
        (
            "POST",
            "/v1/volumes",
            "{\"name\":\"v\",\"size\":\"1000\"}",
            "whole sectors",
        ),
        (
            "POST",
            "/v1/volumes",
            "{\"name\":\"v\",\"size\":0}",
            "whole sectors",
        ),
        ("POST", "/v1/volumes", "{", "not understood"),
        (
            "POST",
            "/v1/machines",
            "{\"name\":\"a\",\"memory\":\"64MiB\",\"vcpus\":0}",
            "vcpus",
        ),
        (
            "POST",
            "/v1/imports",
            "{\"name\":\"v\",\"file\":\"x\",\"format\":\"raw\"}",
            "whole path",
        ),
        (
            "POST",
            "/v1/machines/web1/throttle",
            "{\"bandwidth\":\"80\"}",
            "no unit",
        ),
        ("PATCH", "/v1/volumes", "", "PATCH"),
    ] {
        let (status, error) = d.json(method, path, body).await;
        assert_eq!(status, 400, "{method} {path}");
        assert!(error["what"].as_str().unwrap().contains(word), "{error}");
    }
    let (status, error) = d.json("GET", "/v2/host", "").await;
    assert_eq!((status, &error["code"]), (404, &Value::from("not-found")));
    assert_eq!(d.service.calls(), Vec::<String>::new());
}

#[tokio::test]
async fn a_body_beyond_the_bound_is_refused() {
    let d = daemon().await;
    let body = format!("{{\"name\":\"v\",\"size\":\"{}\"}}", "1".repeat(MAX_BODY));
    let (status, error) = d.json("POST", "/v1/volumes", &body).await;
    assert_eq!(status, 400);
    assert!(error["what"].as_str().unwrap().contains("limit"), "{error}");
}

#[tokio::test]
async fn watching_ends_when_the_migration_is_settled() {
    let d = daemon().await;
    let service = d.service.clone();
    let seen = d.ask("GET", "/v1/migrations/m-1/watch", "");
    let show = async {
        tokio::task::yield_now().await;
        service.show(MigrationView {
            phase: Phase::Copy,
            permille: 400,
            ..sample_migration()
        });
        tokio::task::yield_now().await;
        service.show(MigrationView {
            phase: Phase::Complete,
            state: MigrationState::Completed,
            permille: 1000,
            ..sample_migration()
        });
    };
    let ((status, body), ()) = tokio::join!(seen, show);
    assert_eq!(status, 200);
    let lines = lines(&body);
    let last: WatchLine = serde_json::from_value(lines.last().unwrap().clone()).unwrap();
    assert!(matches!(last, StreamLine::Done(view) if view.phase == Phase::Complete));
}

#[tokio::test]
async fn watching_ends_with_a_word_when_the_daemon_stops() {
    let d = daemon().await;
    let (stopping, service) = (d.stopping.clone(), d.service.clone());
    let seen = d.ask("GET", "/v1/migrations/m-1/watch", "");
    let stop = async {
        // The watch has begun once someone follows the migration.
        while service.watchers() == 0 {
            tokio::task::yield_now().await;
        }
        stopping.cancel();
    };
    let ((_, body), ()) = tokio::join!(seen, stop);
    assert_eq!(lines(&body).last().unwrap()["error"]["code"], "stopping");
    d.served.await.unwrap().unwrap();
    assert!(
        !d.path.exists(),
        "a daemon that stops takes its socket away"
    );
}

#[tokio::test]
async fn an_import_tells_its_end_or_its_error() {
    let d = daemon().await;
    let ask = |file: &str| format!("{{\"name\":\"v\",\"file\":\"/{file}\",\"format\":\"raw\"}}");
    let (status, body) = d.ask("POST", "/v1/imports", &ask("good")).await;
    assert_eq!(
        (status, &lines(&body).last().unwrap()["done"]["name"]),
        (200, &Value::from("v"))
    );
    let (_, body) = d.ask("POST", "/v1/imports", &ask("broken")).await;
    assert_eq!(
        lines(&body).last().unwrap()["error"]["what"],
        "cannot read the image"
    );
}

#[tokio::test]
async fn an_import_ends_with_its_client() {
    let d = daemon().await;
    let mut stream = d
        .send(
            "POST",
            "/v1/imports",
            "{\"name\":\"v\",\"file\":\"/endless\",\"format\":\"raw\"}",
        )
        .await;
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains("\"progress\"") {
        assert_ne!(stream.read_buf(&mut seen).await.unwrap(), 0);
    }
    drop(stream);
    while !d.service.calls().contains(&"import given up".to_string()) {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn the_socket_is_its_owners_alone() {
    let d = daemon().await;
    let mode = std::fs::metadata(&d.path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test]
async fn a_dead_daemons_socket_is_replaced_a_live_ones_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(
        path.exists(),
        "a listener of the standard library leaves its socket behind"
    );
    let socket = bind(&path).await.unwrap();
    assert!(matches!(bind(&path).await, Err(SocketError::InUse { .. })));
    assert!(
        UnixStream::connect(&path).await.is_ok(),
        "the live one is undisturbed"
    );
    drop(socket);
    assert!(bind(&path).await.is_ok());
}

#[tokio::test]
async fn what_is_not_a_socket_is_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api.sock");
    std::fs::write(&path, "precious").unwrap();
    assert!(matches!(
        bind(&path).await,
        Err(SocketError::NotASocket { .. })
    ));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
}

#[tokio::test]
async fn a_path_too_long_for_a_socket_is_refused_in_words() {
    let path = Path::new("/").join("x".repeat(120));
    let error = ApiError::from(bind(&path).await.unwrap_err());
    assert!(error.what.contains("121 bytes long"), "{}", error.what);
    assert!(error.next_step.unwrap().contains("--socket"));
}
