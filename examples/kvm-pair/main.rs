//! tmp
mod bare; mod child; mod cpu; mod guest; mod layout; mod sys; mod tables; mod vcpu; mod vm;
fn main() -> anyhow::Result<()> {
    let a: Vec<String> = std::env::args().collect();
    if a.get(1).map(String::as_str) == Some("bare") {
        let p: u32 = a[3].strip_prefix("--parent=").unwrap().parse()?;
        return bare::run(&child::Parent::new(Some(p))?, a[2].parse()?);
    }
    let [mut o, mut p] = bare::start()?;
    for _ in 0..6 {
    p.tell("echo")?;
    let t = std::time::Instant::now();
    let answer = o.tell("measure 2000")?;
    let took = t.elapsed();
    p.tell("stop")?;
    let mut v = guest::times(&answer, 1e6)?;
    let sum: f64 = v.iter().sum();
    v.sort_by(f64::total_cmp);
    println!("med {} p99 {} min {} kticks; sum {sum}  took {took:?}", v[1000], v[1980], v[0]);
    }
    Ok(())
}
