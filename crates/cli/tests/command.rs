//! The command as a process of its own, with a daemon made of memory or with none.

#[path = "command/authority.rs"]
mod authority;
#[path = "command/hosts.rs"]
mod hosts;
#[path = "command/joining.rs"]
mod joining;
#[path = "command/replays.rs"]
mod replays;
#[path = "command/reports.rs"]
mod reports;
#[path = "command/traces.rs"]
mod traces;

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use whimbrel_engine::switchover::Phase;
use whimbrel_host::api::fake::{FakeService, SAMPLE_TOKEN, sample_migration};
use whimbrel_host::api::{ApiError, ErrorCode, MigrationState, MigrationView, bind, serve};

struct Daemon {
    runtime: tokio::runtime::Runtime,
    service: Arc<FakeService>,
    stopping: CancellationToken,
    dir: tempfile::TempDir,
}

fn daemon(service: FakeService) -> Daemon {
    let dir = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let service = Arc::new(service);
    let stopping = CancellationToken::new();
    let socket = runtime
        .block_on(bind(&dir.path().join("api.sock")))
        .unwrap();
    runtime.spawn(serve(socket, service.clone(), stopping.clone()));
    Daemon {
        runtime,
        service,
        stopping,
        dir,
    }
}

/// Runs `whimbrel --state DIR LINE`.
fn whimbrel(state: &Path, line: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_whimbrel"))
        .args(line.split_whitespace())
        .arg("--state")
        .arg(state)
        .env_remove("RUST_LOG")
        .output()
        .unwrap()
}

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

fn settled(state: MigrationState, phase: Phase, error: Option<ApiError>) -> MigrationView {
    MigrationView {
        state,
        phase,
        error,
        permille: 1000,
        ..sample_migration()
    }
}

#[test]
fn a_host_is_made_and_shown_without_a_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let made = whimbrel(&state, "host init --name a");
    assert_eq!(code(&made), 0, "{}", err(&made));
    assert!(
        err(&made).contains("whimbrel host trust a whk1-"),
        "{}",
        err(&made)
    );
    let shown = whimbrel(&state, "host show --json");
    let view: Value = serde_json::from_str(&out(&shown)).unwrap();
    assert_eq!(
        (&view["name"], &view["daemon"]),
        (&Value::from("a"), &Value::Null)
    );
    let again: Value = serde_json::from_str(&out(&whimbrel(&state, "host init --json"))).unwrap();
    assert_eq!(again["key"], view["key"], "a host keeps its key");
}

#[test]
fn peers_are_trusted_and_untrusted_without_a_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    whimbrel(&state, "host init --name a");
    let key = format!("whk1-{}", "a".repeat(52));
    let trusted = whimbrel(&state, &format!("host trust b {key} 192.0.2.2:7420"));
    assert_eq!(code(&trusted), 0, "{}", err(&trusted));
    assert!(out(&whimbrel(&state, "host ls")).contains("192.0.2.2:7420"));
    let other = format!("whk1-{}", "q".repeat(52));
    let refused = whimbrel(&state, &format!("host trust b {other} 192.0.2.2:7420"));
    assert_eq!(code(&refused), 1);
    assert!(
        err(&refused).contains("next:") && err(&refused).contains("revoke b"),
        "{}",
        err(&refused)
    );
    assert_eq!(code(&whimbrel(&state, "host untrust b")), 0);
    assert!(!out(&whimbrel(&state, "host ls")).contains("192.0.2.2"));
    assert_eq!(code(&whimbrel(&state, "host untrust b")), 1);
}

#[test]
fn a_host_that_was_never_made_says_how() {
    let dir = tempfile::tempdir().unwrap();
    let output = whimbrel(&dir.path().join("none"), "host show");
    assert_eq!(code(&output), 1);
    assert!(
        err(&output).contains("whimbrel host init"),
        "{}",
        err(&output)
    );
}

#[test]
fn without_a_daemon_the_exit_code_is_3() {
    let dir = tempfile::tempdir().unwrap();
    for line in [
        "volume ls",
        "status",
        "watch",
        "migrate web1 --to b",
        "cancel web1",
    ] {
        let output = whimbrel(dir.path(), line);
        assert_eq!(code(&output), 3, "{line}");
        assert!(
            err(&output).contains("whimbrel host run"),
            "{}",
            err(&output)
        );
    }
    let output = whimbrel(dir.path(), "volume ls --json");
    let error: Value = serde_json::from_str(&err(&output)).unwrap();
    assert_eq!(error["exit"], 3);
    assert!(error["error"]["next_step"].is_string());
}

#[test]
fn a_line_that_makes_no_sense_ends_in_2() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(code(&whimbrel(dir.path(), "fly web1")), 2);
    let output = whimbrel(dir.path(), "throttle web1 80 --json");
    assert_eq!(code(&output), 2);
    let error: Value = serde_json::from_str(&err(&output)).unwrap();
    assert!(error["error"]["what"].as_str().unwrap().contains("no unit"));
    assert_eq!(code(&whimbrel(dir.path(), "--help")), 0);
}

#[test]
fn a_bad_configuration_names_file_line_and_key() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("w.toml");
    std::fs::write(&config, "log = \"info\"\nlisten_at = 1\n").unwrap();
    let output = whimbrel(
        dir.path(),
        &format!("host show --config {}", config.display()),
    );
    assert_eq!(code(&output), 1);
    assert!(
        err(&output).contains("w.toml:2: `listen_at`: unknown field"),
        "{}",
        err(&output)
    );
}

#[test]
fn every_question_is_answered_in_words_and_in_json() {
    let d = daemon(FakeService::new());
    let join = format!("host join {SAMPLE_TOKEN}");
    for (line, word) in [
        ("host show", "process 1"),
        ("host ls", "192.0.2.2:7420"),
        ("host rename b c", "called c"),
        ("host allow b --receive no", "may: send"),
        ("host invite", "whi1-"),
        ("host invite --list", "0123456789abcdef"),
        ("host invite --cancel 0123456789abcdef", "taken back"),
        (join.as_str(), "which it calls a"),
        ("host revoke b --force", "trusted no more"),
        ("volume ls", "root"),
        ("volume show root", "1.0 GiB"),
        ("volume create new --size 2GiB", "2.0 GiB"),
        ("volume rm root", "gone"),
        ("machine ls", "web1"),
        ("machine show web1", "pc-q35-10.0"),
        ("machine start web1", "running"),
        ("machine stop web1 --force", "defined"),
        ("machine undefine web1", "forgotten"),
        ("status", "prepare"),
        ("status web1", "pc.ram"),
        ("switch web1", "switches"),
        ("cancel web1", "given up"),
        ("throttle web1 80Mbit", "80Mbit"),
        ("migrate web1 --to b --detach", "on its way"),
    ] {
        let output = whimbrel(d.dir.path(), line);
        assert_eq!(code(&output), 0, "{line}: {}", err(&output));
        assert!(out(&output).contains(word), "{line}: {}", out(&output));
        let output = whimbrel(d.dir.path(), &format!("{line} --json"));
        assert!(
            serde_json::from_str::<Value>(&out(&output)).is_ok(),
            "{line}: {}",
            out(&output)
        );
    }
}

#[test]
fn a_damaged_volume_is_told_beside_the_list() {
    let d = daemon(FakeService::new());
    let output = whimbrel(d.dir.path(), "volume ls");
    assert!(
        err(&output).contains("volumes/old/volume.toml is damaged"),
        "{}",
        err(&output)
    );
}

#[test]
fn an_unknown_machine_ends_in_1_with_a_next_step() {
    let d = daemon(FakeService::new());
    let output = whimbrel(d.dir.path(), "machine show web9");
    assert_eq!(code(&output), 1);
    assert!(err(&output).contains("error: there is no `web9`") && err(&output).contains("next:"));
}

#[test]
fn a_machine_is_defined_from_its_file() {
    let d = daemon(FakeService::new());
    let file = d.dir.path().join("m.toml");
    std::fs::write(
        &file,
        "name = \"web2\"\nmemory = \"64MiB\"\nkernel = \"vmlinuz\"\n",
    )
    .unwrap();
    let output = whimbrel(d.dir.path(), &format!("machine define {}", file.display()));
    assert_eq!(code(&output), 0, "{}", err(&output));
    std::fs::write(
        &file,
        "name = \"web2\"\nmemory = \"64MiB\"\n\n[[disk]]\nvolum = \"root\"\n",
    )
    .unwrap();
    let output = whimbrel(d.dir.path(), &format!("machine define {}", file.display()));
    assert_eq!(code(&output), 1);
    assert!(
        err(&output).contains("m.toml:5: `volum`: unknown field"),
        "{}",
        err(&output)
    );
    assert_eq!(d.service.calls(), ["define web2"]);
}

#[test]
fn an_import_waits_for_its_end() {
    let d = daemon(FakeService::new());
    let good = whimbrel(d.dir.path(), "volume import v good --format raw");
    assert_eq!(code(&good), 0, "{}", err(&good));
    assert!(out(&good).contains("2.0 MiB"));
    let call = &d.service.calls()[0];
    assert!(
        call.starts_with("import v /"),
        "the daemon gets the whole path: {call}"
    );
    let bad = whimbrel(d.dir.path(), "volume import v broken");
    assert_eq!(code(&bad), 1);
    assert!(err(&bad).contains("cannot read the image"));
}

#[test]
fn a_migration_that_completes_ends_in_0() {
    let d = daemon(FakeService::new().with_script(vec![
        MigrationView {
            phase: Phase::Copy,
            permille: 300,
            ..sample_migration()
        },
        settled(MigrationState::Completed, Phase::Complete, None),
    ]));
    let output = whimbrel(
        d.dir.path(),
        "migrate web1 --to b --bandwidth 80Mbit --ram postcopy",
    );
    assert_eq!(code(&output), 0, "{}", err(&output));
    assert!(
        out(&output).contains("100.0 %, complete"),
        "{}",
        out(&output)
    );
    assert_eq!(
        d.service.calls(),
        ["migrate web1 b 80Mbit hold=false Postcopy"]
    );
    let output = whimbrel(d.dir.path(), "watch web1 --json");
    let last: Value = serde_json::from_str(out(&output).lines().last().unwrap()).unwrap();
    assert_eq!(last["state"], "completed");
}

#[test]
fn a_migration_that_fails_ends_in_4_and_says_where_the_machine_is() {
    for state in [MigrationState::Failed, MigrationState::Cancelled] {
        let d = daemon(FakeService::new().with_script(vec![settled(state, Phase::Cancel, None)]));
        let output = whimbrel(d.dir.path(), "migrate web1 --to b");
        assert_eq!(code(&output), 4, "{}", err(&output));
        assert!(
            err(&output).contains("web1 is at its source as before"),
            "{}",
            err(&output)
        );
    }
}

#[test]
fn a_migration_nobody_can_decide_ends_in_5() {
    let error = ApiError::new(ErrorCode::NeedsOperator, "b did not answer the grant")
        .machine_state("paused on both hosts")
        .next_step("look at b");
    let d = daemon(FakeService::new().with_script(vec![settled(
        MigrationState::NeedsOperator,
        Phase::Grant,
        Some(error),
    )]));
    let output = whimbrel(d.dir.path(), "migrate web1 --to b --json");
    assert_eq!(code(&output), 5);
    let told: Value = serde_json::from_str(err(&output).lines().last().unwrap()).unwrap();
    assert_eq!(told["error"]["machine_state"], "paused on both hosts");
    assert_eq!(told["error"]["next_step"], "look at b");
}

#[test]
fn a_peer_that_is_unknown_is_refused_before_anything_moves() {
    let d = daemon(FakeService::new());
    let output = whimbrel(d.dir.path(), "migrate web1 --to nowhere");
    assert_eq!(code(&output), 1);
    assert!(err(&output).contains("`nowhere`"));
}

#[test]
fn watching_goes_on_over_a_restart_of_the_daemon() {
    let d = daemon(FakeService::new());
    let path = d.dir.path().join("api.sock");
    let state = d.dir.path().to_path_buf();
    let watching = std::thread::spawn(move || whimbrel(&state, "watch web1"));
    while d.service.watchers() == 0 {
        std::thread::yield_now();
    }
    d.stopping.cancel();
    while path.exists() {
        std::thread::yield_now();
    }
    let socket = d.runtime.block_on(bind(&path)).unwrap();
    d.service
        .show(settled(MigrationState::Completed, Phase::Complete, None));
    d.runtime
        .spawn(serve(socket, d.service.clone(), CancellationToken::new()));
    let output = watching.join().unwrap();
    assert_eq!(code(&output), 0, "{}", err(&output));
    assert!(
        err(&output).contains("the daemon is stopping"),
        "{}",
        err(&output)
    );
}

#[test]
fn completions_and_manual_pages_are_made() {
    let dir = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish"] {
        assert!(out(&whimbrel(dir.path(), &format!("completions {shell}"))).contains("whimbrel"));
    }
    let pages = dir.path().join("man");
    assert_eq!(
        code(&whimbrel(dir.path(), &format!("man {}", pages.display()))),
        0
    );
    let page = std::fs::read_to_string(pages.join("whimbrel-volume-create.1")).unwrap();
    assert!(page.contains("10GiB"), "{page}");
    assert!(
        std::fs::read_to_string(pages.join("whimbrel.1"))
            .unwrap()
            .contains("Exit codes")
    );
}
