//! Two hosts that have never met, as their operators meet them: state directories, daemons on the
//! loopback, and commands. No QEMU runs.

use super::hosts::{Host, contains};

#[test]
fn two_new_hosts_join_by_one_token() {
    let (oslo, bern) = (Host::running("oslo"), Host::running("bern"));
    let token = oslo.invites("");
    let joined = bern.does(&format!("host join {token}"));
    assert_eq!(joined["peer"]["name"], "oslo");
    assert_eq!(joined["name_there"], "bern");
    assert_eq!(oslo.trusts(), [("bern".to_string(), bern.key())]);
    assert_eq!(bern.trusts(), [("oslo".to_string(), oslo.key())]);
    let address = |host: &Host| host.does("host ls")["items"][0]["addresses"][0].clone();
    assert_eq!(address(&bern), oslo.shown()["listen"]);
    assert_eq!(address(&oslo), bern.shown()["listen"]);

    // The token is used up, for the host that used it and for others.
    let third = Host::new("third");
    for host in [&bern, &third] {
        let error = host.refused(&format!("host join {token}"));
        assert_eq!(error["code"], "peer-refused");
        contains(&error, "what", "used already");
        contains(&error, "machine_state", "nothing was changed");
    }
    assert!(third.trusts().is_empty());
    let list = oslo.does("host invite --list");
    assert_eq!(list["items"][0]["state"], "used");
    assert_eq!(list["items"][0]["used_by"]["name"], "bern");
    assert!(oslo.log_text().contains("joined by an invitation"));
}

#[test]
fn an_invitation_outlives_the_daemon_and_joins_a_host_that_runs_none() {
    let (mut oslo, bern) = (Host::running("oslo"), Host::new("bern"));
    let listen = oslo.shown()["listen"].as_str().unwrap().to_string();
    let token = oslo.invites("--as switzerland --may send");
    oslo.stop();
    // Nobody is there: that is told as such, and costs nothing.
    let error = bern.refused(&format!("host join {token}"));
    assert_eq!(error["code"], "peer-unreachable");
    oslo.start_at(&listen);
    let joined = bern.does(&format!("host join {token} --as norway --may receive"));
    assert_eq!(joined["name_there"], "switzerland");
    let at_oslo = &oslo.does("host ls")["items"][0];
    assert_eq!(
        (&at_oslo["name"], &at_oslo["may"][0]),
        (&"switzerland".into(), &"send".into())
    );
    let at_bern = &bern.does("host ls")["items"][0];
    assert_eq!(
        (&at_bern["name"], &at_bern["may"][0]),
        (&"norway".into(), &"receive".into())
    );
}

#[test]
fn tokens_that_are_no_good_say_which_way() {
    let (oslo, bern) = (Host::running("oslo"), Host::new("bern"));
    let token = oslo.invites("");
    // Mistyped, cut, of another kind, nonsense.
    let mut mistyped = token.clone();
    let other = if &token[50..51] == "a" { "b" } else { "a" };
    mistyped.replace_range(50..51, other);
    for (said, why) in [
        (mistyped.as_str(), "checksum"),
        (&token[..60], "was it cut"),
        (oslo.key().as_str(), "host trust"),
        ("whatever", "begins with whi1-"),
    ] {
        let error = bern.refused(&format!("host join {said}"));
        assert_eq!(error["code"], "invalid");
        contains(&error, "what", why);
        contains(&error, "machine_state", "nothing was changed");
    }
    // This host's own.
    let error = oslo.refused(&format!("host join {token}"));
    contains(&error, "what", "this host's own");
    contains(&error, "next_step", "on the host that is to join");
    // Taken back.
    let id = oslo.does("host invite --list")["items"][0]["id"].clone();
    oslo.does(&format!("host invite --cancel {}", id.as_str().unwrap()));
    let error = bern.refused(&format!("host join {token}"));
    contains(&error, "what", "cancelled");
    // Expired: the file is as it would be a minute later.
    let token = oslo.invites("--expires 60s");
    let file = oslo.state.join("invitations.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    let lines = text
        .lines()
        .map(|line| match line.strip_prefix("expires = ") {
            Some(at) => format!("expires = {}\n", at.parse::<u64>().unwrap() - 60),
            None => format!("{line}\n"),
        });
    std::fs::write(&file, lines.collect::<String>()).unwrap();
    let error = bern.refused(&format!("host join {token}"));
    contains(&error, "what", "expired");
    contains(&error, "next_step", "host invite");
    contains(&error, "where", "127.0.0.1:");
    assert!(oslo.trusts().is_empty() && bern.trusts().is_empty());
    // Of a state directory that was made anew since, on the same key.
    let token = oslo.invites("");
    std::fs::remove_file(&file).unwrap();
    let error = bern.refused(&format!("host join {token}"));
    contains(&error, "what", "no such invitation");
}

#[test]
fn names_that_collide_are_the_operators_to_choose() {
    let (oslo, first, second) = (Host::running("oslo"), Host::new("bern"), Host::new("bern"));
    let token = oslo.invites("");
    first.does(&format!("host join {token}"));
    let token = oslo.invites("");
    let error = second.refused(&format!("host join {token}"));
    contains(&error, "what", "another host is called 'bern' there");
    contains(&error, "next_step", "--name");
    let joined = second.does(&format!("host join {token} --name basel"));
    assert_eq!(joined["name_there"], "basel");

    // The other way round: another host is called oslo here.
    let other = Host::running("oslo");
    let token = other.invites("");
    let error = second.refused(&format!("host join {token}"));
    assert_eq!(error["code"], "exists");
    contains(&error, "next_step", "--as NAME");
    second.does(&format!("host join {token} --as oslo2"));
    let names: Vec<String> = second.trusts().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["oslo", "oslo2"]);
}

#[test]
fn a_trusted_host_is_renamed_limited_and_revoked_with_and_without_a_daemon() {
    for runs in [true, false] {
        let (mut oslo, bern) = (Host::running("oslo"), Host::new("bern"));
        let token = oslo.invites("");
        bern.does(&format!("host join {token}"));
        if !runs {
            oslo.stop();
        }
        assert_eq!(oslo.does("host rename bern basel")["name"], "basel");
        let refused = oslo.refused("host rename bern zug");
        assert_eq!(refused["code"], "not-found");
        let may = oslo.does("host allow basel --receive no")["may"].clone();
        assert_eq!(may, serde_json::json!(["send"]));
        let may = oslo.does("host allow basel --send no")["may"].clone();
        assert_eq!(may, serde_json::json!([]));
        let key = bern.key();
        assert_eq!(oslo.trusts(), [("basel".to_string(), key.clone())]);
        // Told again by key, it keeps what it may.
        let again = oslo.does(&format!("host trust basel {key} 127.0.0.1:1"));
        assert_eq!(again["may"], serde_json::json!([]));
        oslo.does("host revoke basel");
        assert!(oslo.trusts().is_empty());
        assert_eq!(oslo.refused("host revoke basel")["code"], "not-found");
    }
}

#[test]
fn a_migration_that_is_not_over_keeps_its_peer_from_being_revoked() {
    let oslo = Host::new("oslo");
    let key = format!("whk1-{}", "a".repeat(52));
    oslo.does(&format!("host trust bern {key} 127.0.0.1:1"));
    let folder = oslo
        .state
        .join("migrations/0123456789abcdef0123456789abcdef");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("peer"), "before-it-was-renamed").unwrap();
    std::fs::write(folder.join("peer-key"), &key).unwrap();
    let error = oslo.refused("host revoke bern");
    assert_eq!(error["code"], "busy");
    contains(&error, "what", "is not over");
    oslo.does("host revoke bern --force");
    assert!(oslo.trusts().is_empty());
}
