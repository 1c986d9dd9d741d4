use super::*;
use crate::report::page::tests::well_formed;
use proptest::prelude::*;

fn steps(values: &[f64]) -> Vec<Step> {
    let step = |(n, &high): (usize, &f64)| Step {
        from: n as f64,
        to: n as f64 + 1.0,
        low: 0.0,
        high,
    };
    values.iter().enumerate().map(step).collect()
}

fn sample(unit: Unit, values: &[f64]) -> Chart {
    let series = |name: &str, colour, shape| Series {
        name: name.to_string(),
        colour,
        shape,
        steps: steps(values),
    };
    Chart {
        title: "rate & <more>".to_string(),
        from: 0.0,
        to: values.len() as f64,
        unit,
        series: vec![
            series("area", 0, Shape::Area),
            series("\"line\"", 9, Shape::Line),
        ],
        bands: vec![Band {
            from: 1.0,
            to: 1.001,
            name: "stop".to_string(),
            is_stop: true,
        }],
        levels: vec![Level {
            at: 10.0,
            name: "bound".to_string(),
        }],
    }
}

proptest! {
    #[test]
    fn whatever_is_drawn_is_well_formed(
        title in "\\PC{0,30}|.{0,30}",
        values in prop::collection::vec(prop_oneof![
            Just(f64::NAN), Just(f64::INFINITY), Just(0.0), -1e12..1e15f64, 0.0..1.0f64
        ], 0..30),
        unit in prop::sample::select(vec![Unit::Millis, Unit::BitsPerSecond, Unit::Bytes, Unit::Count]),
    ) {
        let chart = Chart { title: title.clone(), ..sample(unit, &values) };
        let text = document(&title, &[Panel::Chart(chart)]);
        well_formed(&text);
        prop_assert!(!text.contains("NaN") && !text.contains("inf"), "{}", text);
    }

    #[test]
    fn axes_have_a_handful_of_ticks(span in 0.001..1e7f64) {
        let ticks = time_ticks(0.0, span);
        prop_assert!((2..=12).contains(&ticks.len()), "{}: {:?}", span, ticks);
        let scale = Scale::of(&sample(Unit::BitsPerSecond, &[span * 1e3]));
        prop_assert!((3..=7).contains(&scale.ticks.len()), "{}: {:?}", span, scale.ticks);
    }
}

#[test]
fn ticks_are_numbers_that_people_count_in() {
    let words =
        |from, to| -> Vec<String> { time_ticks(from, to).into_iter().map(|t| t.1).collect() };
    assert_eq!(
        words(0.0, 30.0),
        ["0 s", "5 s", "10 s", "15 s", "20 s", "25 s", "30 s"]
    );
    assert_eq!(words(0.0, 200.0)[2..4], ["1:00 min", "1:30 min"]);
    assert_eq!(words(0.0, 36_000.0)[2], "2:00 h");
    assert_eq!(words(0.0, 0.05)[1], "0.01 s");
    let scale = Scale::of(&sample(Unit::BitsPerSecond, &[73e6]));
    let said: Vec<_> = scale.ticks.iter().map(|t| t.1.as_str()).collect();
    assert_eq!(
        said,
        [
            "0 Mbit/s",
            "20 Mbit/s",
            "40 Mbit/s",
            "60 Mbit/s",
            "80 Mbit/s"
        ]
    );
    let scale = Scale::of(&sample(Unit::Millis, &[0.4, 80.0]));
    let said: Vec<_> = scale.ticks.iter().map(|t| t.1.as_str()).collect();
    assert_eq!(said, ["100 µs", "1 ms", "10 ms", "100 ms"]);
    assert_eq!(say(Unit::Bytes, 3.5 * 1024.0 * 1024.0), "3.5 MiB");
}

#[test]
fn gaps_stay_gaps() {
    let mut broken = steps(&[1.0, 2.0, 3.0, 4.0]);
    broken.remove(1);
    assert_eq!(unbroken(&broken).len(), 2);
    let chart = Chart {
        series: vec![Series {
            name: "x".to_string(),
            colour: 0,
            shape: Shape::Line,
            steps: broken,
        }],
        ..sample(Unit::Count, &[1.0; 4])
    };
    let text = panel(&Panel::Chart(chart));
    let line = text.split("class=\"line s0\" d=\"").nth(1).expect("a line");
    let line = &line[..line.find('"').expect("its end")];
    assert_eq!(line.matches('M').count(), 2, "{line}");
}

#[test]
fn what_is_too_short_to_be_seen_is_seen() {
    let text = panel(&Panel::Chart(sample(Unit::Count, &[1.0; 4000])));
    assert!(text.contains("width=\"1.5\""), "{text}");
}
