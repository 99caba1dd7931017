-- A database for each version of the shop; the shop fills its own.
create database shop_old;
create database shop_new;
