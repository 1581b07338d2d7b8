// What the server says of a job, in words and numbers.

export const isOpen = (job) => job.status === "queued" || job.status === "in_progress";

/** The results of a finished job: {path, name, video, other}; `other` is what is no image: "audio" or "file". */
export function filesOf(job) {
  if (job.object === "generation") {
    return job.data.map(({ name }, index) => ({
      path: `v1/generations/${job.id}/content/${index}`,
      name: `${job.id}-${name}`,
      other: name.endsWith(".wav") ? "audio" : "file",
    }));
  }
  const video = job.object === "video";
  return Array.from({ length: job.data?.length ?? job.n }, (_, index) => ({
    path: video ? `v1/videos/${job.id}/content?index=${index}` : `v1/images/${job.id}/content/${index}`,
    name: `${job.id}-${index}.${video ? "mp4" : job.output_format.replace("jpeg", "jpg")}`,
    video,
  }));
}

/** The settings of a job under the names of a request's fields. */
export function settingsOf(job) {
  const { num_outputs_per_prompt: n, ...others } = job.parameters;
  const { output_format: format, output_compression } = job; // of images
  return { ...others, output_format: format === "png" ? null : format, output_compression, prompt: job.prompt, seed: job.seed, n };
}

/** One line on a job that has ended. */
export function lineOf(job) {
  const parts = [];
  if (job.size !== "auto") parts.push(job.size.replace("x", " × "));
  if (job.object === "video" && job.seconds !== "auto") parts.push(duration(Number(job.seconds)));
  const steps = job.parameters.num_inference_steps;
  if (steps) parts.push(steps === 1 ? "1 step" : `${steps} steps`);
  parts.push(`seed ${job.seed}`);
  if (job.status === "completed" && job.seconds_taken) parts.push(`took ${duration(job.seconds_taken)}`);
  return parts.map((part) => part.replaceAll(" ", "\u00a0")).join(" · "); // no line ends inside of them
}

/** One line on an open job, and the share of it that is done (null: not known). */
export function progressOf(job) {
  if (job.status === "queued") {
    const words = job.attempts > 0 ? "Put back into the queue" : "In the queue";
    if (job.position === null) return [words, 0];
    return [job.position > 0 ? `${words}, ${job.position} before it` : `${words}, next`, 0];
  }
  const share = job.steps ? job.step / job.steps : null;
  if (job.cancel_requested) return ["Cancelling after this step", share];
  if (!job.steps) return ["Starting", null];
  if (job.phase === "encode") return ["Reading the prompt", null];
  if (job.phase === "decode") return ["Steps done, decoding", null];
  const parts = [`Step ${job.step} of ${job.steps}`];
  if (job.seconds_per_step) parts.push(`${number(job.seconds_per_step)} s per step`);
  if (job.seconds_left) parts.push(`about ${duration(job.seconds_left)} left`);
  return [parts.join(" · "), share];
}

/** Seconds in words. */
export function duration(seconds) {
  if (seconds < 9.95) return `${number(seconds)} s`;
  const whole = Math.round(seconds);
  if (whole < 90) return `${whole} s`;
  if (whole < 5400) return `${Math.round(whole / 60)} min`;
  return `${Math.floor(whole / 3600)} h ${Math.round((whole % 3600) / 60)} min`;
}

const number = (value) => (value < 0.095 ? value.toFixed(2) : value.toFixed(1)).replace(/\.0$/, "");

/** Bytes in words. */
export const size = (bytes) => (bytes < 1e9 ? `${Math.round(bytes / 1e6)} MB` : `${(bytes / 1e9).toFixed(1)} GB`);
