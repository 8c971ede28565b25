//! The words of a ring, as a ring touches them: in which order, and how often.

use std::cell::{Cell, RefCell};

use super::*;

thread_local! {
    static LOG: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// A word that notes what is done to it.
struct Noted(&'static str, Cell<u16>);

fn note(what: String) {
    LOG.with_borrow_mut(|log| log.push(what));
}

impl Word for Noted {
    fn load(&self) -> u16 {
        note(format!("load {}", self.0));
        self.1.get()
    }

    fn load_acquire(&self) -> u16 {
        note(format!("acquire {}", self.0));
        self.1.get()
    }

    fn store(&self, value: u16) {
        note(format!("store {} {value}", self.0));
        self.1.set(value);
    }

    fn store_release(&self, value: u16) {
        note(format!("release {} {value}", self.0));
        self.1.set(value);
    }

    fn full_barrier() {
        note("barrier".into());
    }
}

fn word(name: &'static str) -> Noted {
    Noted(name, Cell::new(0))
}

fn flag() -> Wish<Noted> {
    Wish::Flag { word: word("flags"), bit: 1 }
}

fn event(value: u16) -> Wish<Noted> {
    Wish::Event { word: Noted("event", Cell::new(value)) }
}

#[test]
fn both_ends_store_then_bar_then_load() {
    for (wish, told) in [(flag as fn() -> _, "flags"), (|| event(0), "event")] {
        let mut producer = Producer::new(word("index"), wish(), 0);
        let mut consumer = Consumer::new(word("index"), wish(), 0);
        producer.advance();
        producer.advance();
        producer.publish();
        producer.publish();
        assert!(producer.needs_notification() && !producer.needs_notification());
        assert_eq!(LOG.take(), ["release index 2", "barrier", &format!("load {told}")]);
        consumer.ask_for(1);
        consumer.observe();
        assert_eq!(LOG.take(), [&format!("store {told} 0"), "barrier", "acquire index"]);
        consumer.ask_for_none();
        let off = if told == "flags" { 1 } else { 0_u16.wrapping_sub(LAG) };
        assert_eq!(LOG.take(), [format!("store {told} {off}")]);
    }
}

#[test]
fn a_producer_notifies_when_it_passes_the_event_index_and_only_then() {
    // Both ends of the numbers, and the places where they wrap.
    for start in [0_u16, 1, 0x7fff, 0x8000, 0xfffe, 0xffff] {
        for count in [1_u16, 2, 3, 100, 0x7fff, 0x8000] {
            for (ahead, wanted) in [
                (0, true),
                (count - 1, true),
                (count, false),
                (0x8000, false),
                (0xffff, false),
                (0_u16.wrapping_sub(LAG), false),
            ] {
                let mut producer = Producer::new(word("index"), event(start.wrapping_add(ahead)), start);
                (0..count).for_each(|_| producer.advance());
                producer.publish();
                assert_eq!(producer.needs_notification(), wanted, "{start} + {count}, {ahead} ahead");
                assert!(!producer.needs_notification(), "asked once more");
            }
        }
    }
}

#[test]
fn a_producer_that_goes_all_round_between_two_questions_has_passed_the_event_index() {
    for rounds in [2_u32, 4, 1 << 18] {
        let mut producer = Producer::new(word("index"), event(7), 7);
        for _ in 0..rounds {
            producer.next = producer.next.wrapping_add(0x8000);
            producer.publish();
        }
        assert!(producer.needs_notification(), "{rounds} half rounds");
    }
}

#[test]
fn a_consumer_that_polls_is_never_passed_at_its_event_index() {
    // As far apart as they can be: a whole ring, taken in one go.
    for size in [1_u16, 64, 256, 0x8000] {
        let mut consumer = Consumer::new(word("index"), event(0), 0);
        consumer.ask_for_none();
        let mut producer = Producer::new(word("index"), event(0), 0);
        for _ in 0..1_000_000 / u32::from(size) {
            (0..size).for_each(|_| producer.advance());
            producer.publish();
            if let (Wish::Event { word: read }, Wish::Event { word: written }) =
                (&producer.wish, &consumer.wish)
            {
                read.1.set(written.1.get());
            }
            assert!(!producer.needs_notification());
            consumer.accept(producer.published());
            consumer.next = producer.published();
            LOG.take();
        }
    }
}

#[test]
fn what_is_asked_for_ahead_stays_asked_for() {
    for start in [0_u16, 0x7fff, 0xf800, 0xffff] {
        for count in [0, 1, 2, 100, 0x1000, 0x8000] {
            let mut consumer = Consumer::new(word("index"), event(0), start);
            let asked = consumer.ask_for(count);
            assert_eq!(asked, count.clamp(1, MOST_AHEAD));
            LOG.take();
            // As it looks once more, and as the entries come.
            (0..=asked).for_each(|come| consumer.accept(start.wrapping_add(come)));
            assert!(LOG.take().is_empty());
            let Wish::Event { word } = &consumer.wish else { unreachable!() };
            assert_eq!(word.1.get(), start.wrapping_add(asked - 1));
        }
    }
}

#[test]
fn polling_touches_the_event_index_once_in_thousands_of_entries() {
    let mut consumer = Consumer::new(word("index"), event(0), 0);
    let mut index = 0_u16;
    for _ in 0..1_000_000 {
        index = index.wrapping_add(1);
        consumer.accept(index);
        consumer.advance();
    }
    let touched = LOG.take();
    assert!(touched.len() < 60 && touched.iter().all(|what| what.starts_with("store event")));
}
