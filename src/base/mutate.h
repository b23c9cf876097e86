/*
 * Rules of the protocol that a test can break on purpose. `if (EPX__MUTATE(name))` is `if (0)` in every build but one
 * made with -DEPX_MUTATIONS=ON; there it is true when the environment's EPX_MUTATION is that name. Each broken rule
 * has a twin in tests/model, and tests/stress/run_mutations.sh requires that the tests catch it.
 */
#ifndef EPX_BASE_MUTATE_H
#define EPX_BASE_MUTATE_H

#ifdef EPX_MUTATIONS
int epx__mutation_is(const char *name);
#define EPX__MUTATE(name) epx__mutation_is(#name)
#else
#define EPX__MUTATE(name) 0
#endif

#endif
